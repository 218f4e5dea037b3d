"""A `.pte` with Core ML inside, unpacked and run by the interpreter."""

import coremltools as ct
import pytest
from torch import nn

from cq_edge.errors import ExportError
from cq_edge.manifest import TensorSpec
from cq_edge.model.weight_only import with_weights_of
from exporters.graph_spec import GraphSpec
from exporters.module_graph import module_graph
from exporters.parity import check_parity
from exporters.to_coreml import weight_bytes
from exporters.to_executorch_coreml import export_executorch_coreml, unpacked_methods
from runtime.mil.interpreter import read_functions
from tests.exporters.tiny_graphs import SPECS, tiny_arrays, tiny_graphs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The methods, the functions that compute them, and the float modules."""
    folder = tmp_path_factory.mktemp("delegate")
    modules = tiny_graphs()
    path = folder / "coreml.pte"
    stored = with_weights_of(nn.ModuleList([modules["denoise"], modules["denoise_shallow"]]), 8)
    smaller = {**modules, "denoise": stored[0], "denoise_shallow": stored[1]}
    export_executorch_coreml(smaller, SPECS, path)
    methods = unpacked_methods(path, folder / "unpacked")
    return path, methods, read_functions(methods["denoise"].package), modules


@pytest.mark.slow
def test_every_method_computes_what_its_module_does_early_and_late(exported):
    _, methods, functions, modules = exported
    assert set(methods) == set(SPECS)
    for name, method in methods.items():
        spec = SPECS[name]
        assert method.inputs == tuple(i.name for i in spec.inputs)

        def run(arrays, method=method, spec=spec):
            found = functions[method.function].run(arrays)
            return {o.name: found[n] for o, n in zip(spec.outputs, method.outputs, strict=True)}

        inputs = [tiny_arrays(spec, timestep) for timestep in (999.0, 1.0)]
        floor_db = 28.0 if name.startswith("denoise") else 45.0
        check_parity(name, module_graph(modules[name], spec), run, inputs, floor_db)


@pytest.mark.slow
def test_the_file_holds_one_model_in_which_the_shallow_graph_has_no_weights_of_its_own(exported):
    _, methods, _, modules = exported
    assert len({method.package for method in methods.values()}) == 1
    functions = ct.utils.load_spec(str(methods["denoise"].package)).mlProgram.functions
    full, shallow = (_stored(functions[name]) for name in ("denoise", "denoise_shallow"))
    assert len(shallow) > 10
    assert shallow <= full
    held = {id(p): p.numel() for module in modules.values() for p in module.parameters()}
    assert weight_bytes(methods["denoise"].package) < 2 * sum(held.values())


def _stored(function):
    """Returns where in the weight file a function's weights lie."""
    operations = function.block_specializations[function.opset].operations
    bindings = [b for op in operations for given in op.inputs.values() for b in given.arguments]
    attributes = [value for op in operations for value in op.attributes.values()]
    values = [*attributes, *(binding.value for binding in bindings)]
    return {
        value.blobFileValue.offset
        for value in values
        if value.WhichOneof("value") == "blobFileValue"
    }


def test_a_graph_that_core_ml_takes_in_pieces_is_refused(tmp_path):
    class Halves(nn.Module):
        def forward(self, x):
            return x.argmin().float() + x

    spec = GraphSpec(
        "decode", (TensorSpec("x", (1, 4), "float32"),), (TensorSpec("y", (1, 4), "float32"),)
    )
    with pytest.raises(ExportError, match=r"graph decode is .* pieces? of Core ML and outside it"):
        export_executorch_coreml({"decode": Halves().eval()}, {"decode": spec}, tmp_path / "a.pte")
    assert list(tmp_path.iterdir()) == []
