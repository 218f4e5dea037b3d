from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cq_edge.errors import BundleError
from cq_edge.manifest import ReuseTableEntry
from runtime.bundle import Bundle, open_bundle
from tests.tiny_bundle import reuse_table


def test_an_open_bundle_gives_its_tokenizer_and_tables(bundle: Bundle) -> None:
    assert bundle.calibrated() == (("ddim", 10),)
    assert np.array_equal(bundle.reuse_table("ddim", 10).gain, reuse_table().gain, equal_nan=True)
    assert bundle.tokenizers()[0].encode("a red star")[0].shape == (1, 77)
    assert bundle.path("graphs.pte").is_file()


def test_the_default_table_comes_first_among_those_asked_for(bundle: Bundle) -> None:
    reuse_table("euler", 5).save(bundle.path("reuse_euler_5.npz"))
    entries = (ReuseTableEntry("reuse_euler_5.npz", "euler", 5), *bundle.manifest.reuse_tables)
    both = Bundle(bundle.folder, replace(bundle.manifest, reuse_tables=entries))

    def names(*asked: Any) -> list[str]:
        return [table.noise_scheduler for table in both.reuse_tables(*asked)]

    assert names() == ["ddim", "euler"]
    assert names("euler") == names(None, 5) == names("euler", 5) == ["euler"]
    assert names("ddim", 10) == ["ddim"]
    with pytest.raises(BundleError, match="is not calibrated for euler at 10 steps: use euler"):
        both.reuse_tables("euler", 10)
    with pytest.raises(BundleError, match="is not calibrated for ddim at 7 steps"):
        both.reuse_tables(None, 7)


def test_a_table_that_is_not_there_names_those_that_are(bundle: Bundle) -> None:
    with pytest.raises(BundleError) as caught:
        bundle.reuse_table("euler", 20)
    assert str(caught.value) == (
        f"{bundle.folder} is not calibrated for euler at 20 steps: use ddim at 10 steps, or run "
        "every step full"
    )
    bare = Bundle(bundle.folder, replace(bundle.manifest, reuse_tables=()))
    with pytest.raises(BundleError) as caught:
        bare.reuse_table("euler", 20)
    assert str(caught.value) == (
        f"{bundle.folder} is not calibrated for euler at 20 steps: run every step full"
    )


def test_a_table_of_another_sampler_than_the_manifest_says_is_refused(bundle: Bundle) -> None:
    bundle.path("reuse_ddim_10.npz").unlink()
    reuse_table("euler", 10).save(bundle.path("reuse_ddim_10.npz"))
    with pytest.raises(BundleError) as caught:
        bundle.reuse_table("ddim", 10)
    assert str(caught.value) == (
        "reuse_ddim_10.npz is a reuse table for euler at 10 steps, but the manifest says ddim at "
        "10 steps: build the bundle again"
    )


def test_a_changed_file_is_found_when_the_bundle_opens(bundle: Bundle) -> None:
    path = bundle.path("graphs.pte")
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"graphs\.pte"):
        open_bundle(bundle.folder)
    open_bundle(bundle.folder, verify=False)


@pytest.mark.parametrize("name", ["graphs.pte", "tokenizer/vocab.json", "reuse_ddim_10.npz"])
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    bundle.path(name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(bundle.folder)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        open_bundle(tmp_path)
