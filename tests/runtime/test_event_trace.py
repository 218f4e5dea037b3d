"""The wheel has no event tracer: that is refused with real graphs; what a tracer writes is made
here with ExecuTorch's own serialisation."""

import pytest
from executorch.devtools.etdump import schema_flatcc as etdump
from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

from cq_edge.errors import UsageError
from runtime.event_trace import operator_times, traced_operators
from runtime.operator_time import OperatorTime


def _event(name, start_us, end_us, *, instruction=-1, inside=None, number=-1):
    profiled = etdump.ProfileEvent(
        name, 0, instruction, number, inside, None, start_us * 1000, end_us * 1000
    )
    return etdump.Event(profiled, None, None)


def _run(slower):
    events = [
        _event("Method::execute", 0, 900 * slower),
        _event("DELEGATE_CALL", 0, 500, instruction=0),
        _event("", 0, 300 * slower, instruction=0, inside="Convolution"),
        _event("Sigmoid", 300, 400, instruction=0, number=0),
        _event("", 400, 420 * slower, instruction=0, inside="Convolution"),
        _event("OPERATOR_CALL", 500, 640, instruction=1),
        _event("native_call_permute_copy.out", 510, 630, instruction=1),
        _event("DELEGATE_CALL", 650, 850, instruction=2),
    ]
    return etdump.RunData("run", -1, [], events)


def test_every_operator_has_its_median_and_what_wraps_operators_is_none():
    runs = [etdump.RunData("load", -1, [], [_event("Program::load_method", 0, 9)])]
    made = serialize_to_etdump_flatcc(etdump.ETDumpFlatCC(0, [*runs, *map(_run, (1, 1, 9))]))
    dump = len(made).to_bytes(4, "little") + made  # as the tracer's has, its size goes before it
    assert operator_times("decode", dump) == [
        OperatorTime("decode", "Convolution", "delegate", 0.3),
        OperatorTime("decode", "Sigmoid", "delegate", 0.1),
        OperatorTime("decode", "Convolution", "delegate", 0.02),
        OperatorTime("decode", "permute_copy.out", "portable", 0.12),
        OperatorTime("decode", "a delegate's piece", "delegate", 0.2),
    ]


def test_a_build_without_the_tracer_says_so_and_what_would_help(real_bundle):
    with pytest.raises(UsageError, match=r"^this ExecuTorch was built without its event tracer, "):
        traced_operators(real_bundle, 1)
