import numpy as np
import pytest

from cq_edge.checks import Check, Checks, load_checks, save_checks
from cq_edge.errors import BundleError


def check(number):
    x = np.full((1, 2), number, np.float32)
    return Check({"x": x, "ids": np.array([number])}, {"y": 2 * x}, {"coreml": {"y": 2.1 * x}})


def test_checks_are_read_as_they_were_saved(tmp_path):
    seals = {"graphs.pte": "0" * 64, "Unet.mlpackage/Manifest.json": "f" * 64}
    whole = Checks({"decode": [check(i) for i in range(11)]}, seals)
    save_checks(tmp_path / "checks.npz", whole)
    assert load_checks(tmp_path / "checks.npz").seals == seals
    found = load_checks(tmp_path / "checks.npz").graphs["decode"]
    assert len(found) == 11
    for number, one in enumerate(found):
        expected = check(number)
        for kind in ("inputs", "expected"):
            arrays, others = getattr(one, kind), getattr(expected, kind)
            assert arrays.keys() == others.keys()
            assert all(np.array_equal(arrays[name], others[name]) for name in arrays)
        assert np.array_equal(one.exported["coreml"]["y"], expected.exported["coreml"]["y"])


def test_a_missing_file_says_that_nothing_can_be_verified(tmp_path):
    with pytest.raises(BundleError) as refusal:
        load_checks(tmp_path / "checks.npz")
    assert str(refusal.value) == (
        f"{tmp_path / 'checks.npz'} is missing: without it nothing can be verified; build again"
    )


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "checks.npz").write_bytes(content)
    with pytest.raises(BundleError, match="is no file of checks"):
        load_checks(tmp_path / "checks.npz")


def test_an_archive_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "checks.npz", weights=np.zeros(3))
    with pytest.raises(BundleError, match="is no file of checks"):
        load_checks(tmp_path / "checks.npz")
