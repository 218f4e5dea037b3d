import json

import pytest

from cq_edge.errors import BundleError
from cq_edge.operators import Operator, load_operators, merged, multiply_adds, save_operators

LINEAR = Operator("linear", "int8", 1, 77, 64, 32, 77 * 64, 64 * 32, 4 * 77 * 32)
ADD = Operator("elementwise", "float32", 1, 0, 0, 0, 8, 0, 4)


def test_what_is_saved_is_loaded_with_equal_operators_counted(tmp_path):
    path = tmp_path / "operators.json"
    save_operators(path, {"xnnpack": {"denoise": (LINEAR, ADD, LINEAR)}})
    (found,) = load_operators(path)["xnnpack"].values()
    assert [(o.kind, o.count) for o in found] == [("linear", 2), ("elementwise", 1)]
    assert multiply_adds(found) == 2 * 77 * 64 * 32


def test_merging_again_changes_nothing():
    once = merged((LINEAR, ADD, LINEAR))
    assert merged(once) == once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fold"}, 'an operator\'s kind is "fold": it must be one of convolution, '),
        ({"dtype": "int3"}, 'an operator\'s dtype is "int3": it must be one of float32, '),
        ({"rows": -1}, "an operator's rows is -1: it must be a whole number, 0 or more"),
        ({"count": 0}, "an operator's count is 0: it must be a whole number, 1 or more"),
        ({"depth": 1.5}, "an operator's depth is 1.5: it must be a whole number, 0 or more"),
        ({"batch": True}, "an operator's batch is True: it must be a whole number, 1 or more"),
    ],
)
def test_a_row_that_is_no_operator_is_refused_by_field(tmp_path, change, message):
    path = tmp_path / "operators.json"
    save_operators(path, {"xnnpack": {"denoise": (LINEAR,)}})
    content = json.loads(path.read_text())
    for name, value in change.items():
        content["backends"]["xnnpack"]["denoise"][0][content["columns"].index(name)] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError) as refused:
        load_operators(path)
    assert str(refused.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format_version": 1, "columns": [], "backends": {}}']
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "operators.json").write_text(text)
    with pytest.raises(BundleError):
        load_operators(tmp_path / "operators.json")


def test_a_newer_file_is_refused(tmp_path):
    path = tmp_path / "operators.json"
    save_operators(path, {})
    path.write_text(path.read_text().replace('"format_version":1', '"format_version":2'))
    with pytest.raises(BundleError, match=r"format_version is 2: it must be 1$"):
        load_operators(path)
