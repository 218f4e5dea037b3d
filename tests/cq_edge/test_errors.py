import inspect

import pytest

from cq_edge import errors


def exceptions():
    return [c for _, c in inspect.getmembers(errors, inspect.isclass)]


def test_one_class_catches_everything_raised_on_purpose():
    assert all(issubclass(c, errors.CQEdgeError) for c in exceptions())
    with pytest.raises(errors.CQEdgeError, match=r"^too far$"):
        raise errors.ParityError("too far")


def test_a_parity_failure_is_an_export_failure():
    assert issubclass(errors.ParityError, errors.ExportError)


def test_the_tree_in_the_docstring_is_the_tree():
    tree = [line for line in errors.__doc__.splitlines() if "Error" in line]
    for cls in exceptions():
        line = next(line for line in tree if cls.__name__ in line.split())
        depth = len(cls.mro()) - len(errors.CQEdgeError.mro())
        assert line.index(cls.__name__) == 4 + 4 * depth, cls
    assert len(tree) == len(exceptions())
