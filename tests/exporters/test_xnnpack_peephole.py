from dataclasses import replace

from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNAdd,
    XNNDatatype,
    XNNGraph,
    XNNMultiply,
    XNNStaticReshape,
    XNNStaticTranspose,
    XNNTensorValue,
    XNode,
    XValue,
)

from exporters.xnnpack_peephole import simplify

NO_ID = 2**32 - 1


def value(number, dims, constant=0):
    tensor = XNNTensorValue(
        XNNDatatype.xnn_datatype_fp32, len(dims), dims, constant, NO_ID, 0, number
    )
    return XValue(tensor)


def graph(nodes, values, inputs, outputs):
    xnodes = [XNode(xnode_union=node, debug_handle=0, output_min_max=None) for node in nodes]
    return XNNGraph("0", xnodes, values, len(inputs) + len(outputs), inputs, outputs, [])


def transpose(source, result, perm):
    return XNNStaticTranspose(len(perm), perm, source, result, 0)


def nodes_of(simplified):
    return [node.xnode_union for node in simplified.xnodes]


def test_a_transpose_there_and_back_disappears():
    g = graph(
        [transpose(0, 1, [0, 2, 3, 1]), transpose(1, 2, [0, 3, 1, 2]), XNNAdd(2, 0, 3, 0)],
        [value(0, [1, 2, 3, 4]), value(1, [1, 3, 4, 2]), value(2, [1, 2, 3, 4]),
         value(3, [1, 2, 3, 4])],
        [0],
        [3],
    )  # fmt: skip
    simplify(g)
    assert nodes_of(g) == [XNNAdd(0, 0, 3, 0)]
    assert [v.xvalue_union.id_out for v in g.xvalues] == [0, 3]


def test_two_transposes_become_their_product():
    g = graph(
        [transpose(0, 1, [1, 2, 0]), transpose(1, 2, [1, 2, 0])],
        [value(0, [2, 3, 4]), value(1, [3, 4, 2]), value(2, [4, 2, 3])],
        [0],
        [2],
    )
    simplify(g)
    assert nodes_of(g) == [transpose(0, 2, [2, 0, 1])]


def test_a_transpose_that_is_an_output_stays():
    g = graph([transpose(0, 1, [0, 1])], [value(0, [2, 3]), value(1, [2, 3])], [0], [1])
    before = [replace(node) for node in nodes_of(g)]
    simplify(g)
    assert nodes_of(g) == before


def test_a_constant_whose_order_stays_is_not_transposed_while_the_graph_runs():
    g = graph(
        [transpose(1, 2, [0, 2, 3, 1]), XNNMultiply(0, 2, 3, 0)],
        [value(0, [1, 2, 2, 8]), value(1, [1, 8, 1, 1], constant=5), value(2, [1, 1, 1, 8]),
         value(3, [1, 2, 2, 8])],
        [0],
        [3],
    )  # fmt: skip
    simplify(g)
    assert nodes_of(g) == [XNNMultiply(0, 2, 3, 0)]
    assert {v.xvalue_union.id_out: v.xvalue_union.constant_buffer_idx for v in g.xvalues} == {
        0: 0,
        2: 5,
        3: 0,
    }


def test_a_constant_whose_order_changes_is_still_transposed():
    nodes = [transpose(1, 2, [1, 0]), XNNMultiply(0, 2, 3, 0)]
    values = [value(0, [3, 2]), value(1, [2, 3], 5), value(2, [3, 2]), value(3, [3, 2])]
    g = graph(nodes, values, [0], [3])
    simplify(g)
    assert nodes_of(g) == nodes


def test_equal_operators_run_once_and_what_nobody_reads_not_at_all():
    g = graph(
        [XNNAdd(0, 0, 1, 0), XNNAdd(0, 0, 2, 0), XNNMultiply(0, 0, 4, 0), XNNMultiply(1, 2, 3, 0)],
        [value(number, [2]) for number in range(5)],
        [0],
        [3],
    )
    simplify(g)
    assert nodes_of(g) == [XNNAdd(0, 0, 1, 0), XNNMultiply(1, 1, 3, 0)]


def test_a_reshape_of_a_reshape_reads_the_original():
    g = graph(
        [XNNStaticReshape(2, [2, 6], 0, 1, 0), XNNStaticReshape(3, [2, 3, 2], 1, 2, 0)],
        [value(0, [12]), value(1, [2, 6]), value(2, [2, 3, 2])],
        [0],
        [2],
    )
    simplify(g)
    assert nodes_of(g) == [XNNStaticReshape(3, [2, 3, 2], 0, 2, 0)]
