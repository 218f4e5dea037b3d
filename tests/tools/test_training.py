import copy
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from cq_edge.metrics import sqnr_db
from cq_edge.scenes import cover_map, scenes
from tools.demo_training.data import layout_targets, outline_targets, pictures
from tools.demo_training.loop import TrainConfig, train
from tools.demo_training.precision import PlainAttention, autocast, keep_group_norms_float32
from tools.demo_training.unet import _stratified_timesteps
from tools.demo_training.vae import new_vae, normalise_latents
from tools.demo_training.widen import widen

_TWO_PROCESSES = """
import sys
from pathlib import Path
from tests.tools.test_training import TrainConfig, _line, _loss, train

line = _line()
config = TrainConfig("line", 12, 0.1, warmup_steps=5)
train(config, line, lambda step: _loss(line, step), Path(sys.argv[1]))
"""


def _line():
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def _loss(line, seed):
    x = torch.randn(8, 1, generator=torch.Generator().manual_seed(seed))
    return (line(x) - 3 * x).square().mean()


def _run(folder, steps_in_turn):
    """Trains a line to fit y = 3x, stopping and resuming after each of `steps_in_turn`."""
    average = {}
    for stop in steps_in_turn:
        line = _line()

        def loss_of_step(step, line=line, stop=stop):
            if step >= stop:
                raise KeyboardInterrupt
            return _loss(line, step)

        config = TrainConfig("line", 40, 0.1, warmup_steps=5, checkpoint_every=10)
        try:
            average = train(config, line, loss_of_step, folder)
        except KeyboardInterrupt:
            continue
    return average


def test_a_resumed_training_ends_where_an_unbroken_one_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = _run(tmp_path / "a", [99])
    resumed = _run(tmp_path / "b", [15, 33, 99])
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    rows = (tmp_path / "b" / "line_loss.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows] == list(range(40))


def test_two_processes_train_on_the_batches_of_both(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "line.pt", weights_only=True)["network"]
    line = _line()

    def loss_of_step(step):
        return (_loss(line, 2 * step) + _loss(line, 2 * step + 1)) / 2

    (tmp_path / "alone").mkdir()
    train(TrainConfig("line", 12, 0.1, warmup_steps=5), line, loss_of_step, tmp_path / "alone")
    torch.testing.assert_close(line.state_dict(), found)


def test_normalised_latents_have_unit_variance_and_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = new_vae().eval().requires_grad_(requires_grad=False)
    batch = pictures(list(islice(scenes(1, held_out=False), 4)))
    before = vae.decode(vae.encode(batch).latent_dist.mean).sample
    std_before = vae.encode(batch).latent_dist.std
    normalise_latents(vae)
    after = vae.encode(batch).latent_dist
    torch.testing.assert_close(vae.decode(after.mean).sample, before, rtol=1e-3, atol=1e-4)
    assert after.mean.std((0, 2, 3)) == pytest.approx(torch.ones(4), rel=0.5)
    ratio = (after.std / std_before).mean((0, 2, 3))
    many = pictures(list(islice(scenes(2, held_out=False), 4)))
    assert torch.isfinite(vae.encode(many).latent_dist.mean).all()
    assert (ratio > 0).all()


def test_timesteps_cover_the_whole_range_evenly():
    timesteps = _stratified_timesteps(50, torch.Generator().manual_seed(0))
    assert (timesteps // 20).tolist() == list(range(50))


def test_layout_targets_name_what_lies_under_each_cell():
    some = list(islice(scenes(5, held_out=False), 20))
    targets = layout_targets(some, 8)
    for row, scene in enumerate(some):
        shape = scene.shapes[0]
        cell = int(shape.y * 8) * 8 + int(shape.x * 8)
        assert targets["kind"][row, cell] >= 1
        assert targets["colour"][row].unique().numel() >= 2


def test_outlines_say_how_much_of_each_part_of_a_cell_shapes_cover():
    some = list(islice(scenes(5, held_out=False), 4))
    outlines = outline_targets(some, 16, 4)
    assert outlines.shape == (4, 256, 16)
    for row, scene in enumerate(some):
        whole = torch.from_numpy(cover_map(scene, 64))
        assert outlines[row].mean() == pytest.approx(whole.mean().item())
        # the third cell of the second row of cells, its last row of parts
        assert torch.equal(outlines[row, 18, 12:], whole[7, 8:12])


def test_plain_attention_is_numerically_equal_to_diffusers():
    attention = Attention(16, cross_attention_dim=10, heads=2, dim_head=8)
    tokens, context = torch.randn(2, 11, 16), torch.randn(2, 5, 10)
    expected = attention(tokens, encoder_hidden_states=context)
    attention.set_processor(PlainAttention())
    torch.testing.assert_close(attention(tokens, encoder_hidden_states=context), expected)


def test_group_norms_stay_float32_under_autocast():
    norms = nn.Sequential(nn.GroupNorm(2, 8))
    keep_group_norms_float32(norms)
    x = torch.randn(2, 8, 3, 3)
    with autocast("cpu", bf16=True):
        y = norms(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, nn.GroupNorm(2, 8)(x.bfloat16().float()))


def test_a_widened_denoiser_predicts_nearly_what_it_did():
    shape = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16, "norm_num_groups": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    narrow = UNet2DConditionModel(
        **shape, block_out_channels=(32, 64, 96), attention_head_dim=[1, 2, 3]
    )
    wide = UNet2DConditionModel(
        **shape, block_out_channels=(32, 96, 96), attention_head_dim=[1, 3, 3]
    )
    widen(narrow.eval(), wide.eval())
    same = widen(narrow, copy.deepcopy(narrow))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500]), torch.randn(2, 7, 16)
    with torch.no_grad():
        before, after = narrow(*inputs).sample, wide(*inputs).sample
        torch.testing.assert_close(same(*inputs).sample, before)
    assert sqnr_db(before.numpy(), after.numpy()) > 15
