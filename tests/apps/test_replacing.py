import pytest

from apps.replacing import check_replaceable, written_beside
from cq_edge.errors import CQEdgeError, OutputExistsError
from cq_edge.manifest import MANIFEST_FILE


def _bundle(folder, text="old"):
    folder.mkdir()
    (folder / MANIFEST_FILE).write_text(text)
    return folder


def test_a_block_that_ends_well_puts_the_folder_in_place(tmp_path):
    with written_beside(tmp_path / "deep" / "bundle") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "deep" / "bundle").exists()
    assert (tmp_path / "deep" / "bundle" / "file").read_text() == "new"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bundle"]


def test_a_block_that_ends_well_replaces_what_was_there(tmp_path):
    old = _bundle(tmp_path / "bundle")
    with written_beside(old) as folder:
        (folder / MANIFEST_FILE).write_text("new")
    assert (old / MANIFEST_FILE).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path, failure):
    old = _bundle(tmp_path / "bundle")
    with pytest.raises(failure), written_beside(old) as folder:
        (folder / MANIFEST_FILE).write_text("half")
        raise failure
    assert (old / MANIFEST_FILE).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(CQEdgeError) as caught, written_beside(tmp_path / "bundle"):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == (
        f"{tmp_path / 'bundle'} could not be written: [Errno 28] No space left on device"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_replaced_only_by_force(tmp_path):
    old = _bundle(tmp_path / "bundle")
    check_replaceable(old, force=True)
    with pytest.raises(OutputExistsError) as caught:
        check_replaceable(old, force=False)
    assert str(caught.value) == f"{old} exists already: give --force to replace it"


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError) as caught:
        check_replaceable(tmp_path, force=True)
    assert str(caught.value) == (
        f"{tmp_path} is not empty and is no bundle: name a new folder, nothing in this one is "
        "touched"
    )


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError) as caught:
        check_replaceable(tmp_path / "file", force=True)
    assert str(caught.value) == f"{tmp_path / 'file'} is a file: name a folder for the bundle"


def test_a_new_or_empty_folder_is_fine(tmp_path):
    check_replaceable(tmp_path, force=False)
    check_replaceable(tmp_path / "a" / "b", force=False)
