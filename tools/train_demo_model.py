"""Trains the demo model and its scorer from rendered scenes, and packages both.

Each stage resumes from its checkpoint in the work folder and can be run alone; `package`
writes what ships inside `cq_edge`, and `judge` measures it on held-out captions:

    python -m tools.train_demo_model                       # everything, in order
    python -m tools.train_demo_model unet --unet-steps 9000
    python -m tools.train_demo_model latents unet --from-shipped --bf16
    python -m tools.train_demo_model package judge
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from cq_edge.model.load import DEMO_MODEL
from cq_edge.model.scorer import DEMO_SCORER, Scorer
from tools.demo_training import judge, package
from tools.demo_training.data import held_out_scenes, pictures, training_scenes
from tools.demo_training.loop import TrainConfig, load_average, plot_losses
from tools.demo_training.scorer import new_scorer, train_scorer
from tools.demo_training.text import train_text
from tools.demo_training.tokenizer import write_clip_vocabulary
from tools.demo_training.unet import new_unet, train_unet
from tools.demo_training.vae import encode_scenes, psnr_of, train_vae
from tools.demo_training.widen import widen

_DOCS = Path(__file__).parents[1] / "docs"  # the card's pictures lie beside it


@dataclass(frozen=True, slots=True)
class Workshop:
    """The work folder and what the command line said."""

    folder: Path
    device: str
    args: argparse.Namespace

    def tokenizer(self) -> CLIPTokenizer:
        """Returns the tokenizer, made on first use."""
        folder = self._trained("tokenizer", DEMO_MODEL / "tokenizer")
        if not (folder / "vocab.json").exists():
            captions = [scene.caption() for scene in training_scenes(0, 20_000)]
            write_clip_vocabulary(captions, folder, 1024)
        return CLIPTokenizer.from_pretrained(folder)

    def text(self) -> CLIPTextModel:
        """Returns the trained text tower."""
        folder = self._trained("text", DEMO_MODEL / "text_encoder")
        return CLIPTextModel.from_pretrained(folder, dtype=torch.float32).eval()

    def vae(self) -> AutoencoderKL:
        """Returns the trained autoencoder."""
        folder = self._trained("vae", DEMO_MODEL / "vae")
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(self.device)
        return vae.eval().to(memory_format=torch.channels_last)

    def unet(self) -> UNet2DConditionModel:
        """Returns the denoiser to start training from."""
        torch.manual_seed(0)
        unet = new_unet()
        if not self.args.from_shipped:
            return unet
        folder = DEMO_MODEL / "unet"
        return widen(UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32), unet)

    def scorer(self) -> CLIPModel:
        """Returns the scorer to start training from."""
        if self.args.from_shipped:
            return CLIPModel.from_pretrained(DEMO_SCORER, dtype=torch.float32)
        torch.manual_seed(0)
        return new_scorer(self.tokenizer())

    def _trained(self, name: str, shipped: Path) -> Path:
        """Returns where a part lies that a later stage needs."""
        own = self.folder / name
        return shipped if self.args.from_shipped and not own.exists() else own


def train_vae_stage(shop: Workshop) -> None:
    """Trains the autoencoder."""
    config = TrainConfig("vae", shop.args.vae_steps, 3e-3)
    vae = train_vae(config, shop.folder, 32, shop.device)
    held_out = pictures(held_out_scenes(64)).to(shop.device)
    print(f"autoencoder: {psnr_of(vae, held_out):.2f} dB on 64 held-out pictures")
    vae.save_pretrained(shop.folder / "vae")


def train_text_stage(shop: Workshop) -> None:
    """Trains the text tower that conditions the UNet."""
    config = TrainConfig("text", shop.args.text_steps, 1e-3)
    text = train_text(config, shop.tokenizer(), shop.folder, 64, shop.device)
    text.save_pretrained(shop.folder / "text")


def encode_stage(shop: Workshop) -> None:
    """Encodes the scenes that the denoiser learns from, once."""
    latents, captions = encode_scenes(shop.vae(), 4_000_000, shop.args.scenes)
    torch.save({"latents": latents, "captions": captions}, shop.folder / "latents.pt")


def train_unet_stage(shop: Workshop) -> None:
    """Trains the denoiser."""
    data = torch.load(shop.folder / "latents.pt", weights_only=True)
    config = TrainConfig("unet", shop.args.unet_steps, shop.args.unet_learning_rate)
    train_unet(
        config,
        shop.unet(),
        shop.tokenizer(),
        shop.text(),
        data["latents"],
        data["captions"],
        shop.folder,
        shop.args.unet_batch,
        shop.device,
        bf16=shop.args.bf16,
    )


def train_scorer_stage(shop: Workshop) -> None:
    """Trains the scorer."""
    config = TrainConfig("scorer", shop.args.scorer_steps, 1e-3)
    train_scorer(
        config,
        shop.scorer(),
        shop.tokenizer(),
        shop.folder,
        64,
        shop.device,
        looking_steps=shop.args.looking_steps,
        bf16=shop.args.bf16,
    )


def package_stage(shop: Workshop) -> None:
    """Writes the newest averaged weights of everything as the shipped float16 folders; a scorer
    that was not trained stays as it is."""
    unet = new_unet()
    unet.load_state_dict(load_average("unet", shop.folder))
    package.package_pipeline(shop.tokenizer(), shop.text(), shop.vae().cpu(), unet, DEMO_MODEL)
    plot_losses(shop.folder, _DOCS / "demo_model_losses.png")
    if shop.args.from_shipped and not (shop.folder / "scorer.pt").exists():
        return
    clip = new_scorer(shop.tokenizer())
    weights = load_average("scorer", shop.folder)
    clip.load_state_dict(
        {k.removeprefix("clip."): v for k, v in weights.items() if k.startswith("clip.")}
    )
    package.package_scorer(shop.tokenizer(), clip, DEMO_SCORER)


def judge_stage(shop: Workshop) -> None:
    """Measures the shipped folders on held-out captions and draws the sample sheet."""
    judge.judge_scorer(Scorer.load(), shop.args.judge_captions)
    for scale in shop.args.judge_guidance:
        sheet = _DOCS / "demo_model_samples.png"
        judge.judge_model(shop.args.judge_captions, scale, sheet, shop.device)


STAGES = {
    "vae": train_vae_stage,
    "text": train_text_stage,
    "latents": encode_stage,
    "unet": train_unet_stage,
    "scorer": train_scorer_stage,
    "package": package_stage,
    "judge": judge_stage,
}


def main() -> None:
    """Runs the stages named on the command line, in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="checkpoints")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="denoiser and scorer in bfloat16: twice as fast with AVX-512 BF16 and on GPUs",
    )
    parser.add_argument(
        "--from-shipped",
        action="store_true",
        help="parts without a checkpoint start from, or are, the shipped ones",
    )
    parser.add_argument("--vae-steps", type=int, default=1600)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--scenes", type=int, default=48_000, help="scenes encoded once")
    parser.add_argument("--unet-steps", type=int, default=8000)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--unet-learning-rate", type=float, default=1e-3)
    parser.add_argument("--scorer-steps", type=int, default=5000)
    parser.add_argument("--looking-steps", type=int, default=2500, help="of these, the first")
    parser.add_argument("--judge-captions", type=int, default=256)
    parser.add_argument("--judge-guidance", type=float, nargs="+", default=[5.0, 3.5])
    args = parser.parse_args()
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {sorted(unknown)[0]!r}: choose from {', '.join(STAGES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(args.work, args.device, args)
    for name, stage in STAGES.items():
        if not args.stages or name in args.stages:
            stage(shop)


if __name__ == "__main__":
    main()
