"""Which ONNX graphs TensorRT's parser takes, decided without TensorRT."""

from __future__ import annotations

import pytest

from evc_fast.export.operators import OPSETS, TYPES, check_operators

onnx = pytest.importorskip("onnx", reason="needs the export extra")
FLOAT, DOUBLE, INT64, INT8, BOOL = (
    getattr(onnx.TensorProto, name) for name in ("FLOAT", "DOUBLE", "INT64", "INT8", "BOOL")
)


def model(*nodes, inputs=(("x", FLOAT, (2, 3)),), outputs=(("y", FLOAT, None),), constants=(), opset=20, domain=None):
    def value(name, elem_type, shape):
        return onnx.helper.make_tensor_value_info(name, elem_type, shape)

    graph = onnx.helper.make_graph(
        list(nodes), "graph", [value(*each) for each in inputs], [value(*each) for each in outputs], list(constants)
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    if domain is not None:
        imports.append(onnx.helper.make_opsetid(domain, 1))
    return onnx.helper.make_model(graph, opset_imports=imports)


def node(kind, inputs, outputs=("y",), **attributes):
    return onnx.helper.make_node(kind, inputs, outputs, name=f"the_{kind}", **attributes)


def axes(*values):
    return onnx.helper.make_tensor("axes", INT64, [len(values)], values)


def test_a_graph_that_it_takes():
    report = check_operators(
        model(
            node("Shape", ["x"], ["shape"]),
            node("Expand", ["x", "shape"], ["wide"]),
            node("Equal", ["wide", "x"], ["same"]),
            node("Where", ["same", "wide", "x"], ["z"]),
            node("ReduceSum", ["z", "axes"], keepdims=0),
            constants=[axes(1)],
        )
    )
    assert report.problems == []
    assert report.operators == {"Equal": 1, "Expand": 1, "ReduceSum": 1, "Shape": 1, "Where": 1}
    assert report.to_dict() == {"parser": "TensorRT 10.15", "supported": True, "problems": []}


def test_attention_of_opset_23():
    graph = model(node("Attention", ["x", "x", "x"], scale=0.5), inputs=[("x", FLOAT, (1, 1, 2, 8))], opset=23)
    assert check_operators(graph).problems == []


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (
            model(node("Det", ["x"]), inputs=[("x", FLOAT, (3, 3))]),
            "Det 'the_Det': TensorRT 10.15 is not known",
        ),
        (
            model(node("Mystery", ["x"], domain="our.ops"), domain="our.ops", outputs=[("y", FLOAT, (2, 3))]),
            "the graph uses opset 1 of our.ops",
        ),
        (
            model(node("Exp", ["x"]), inputs=[("x", DOUBLE, (2,))], outputs=[("y", DOUBLE, (2,))]),
            "Exp 'the_Exp': input 'x' is DOUBLE, taken are BFLOAT16, FLOAT, FLOAT16",
        ),
        (
            model(node("Add", ["x", "x"]), inputs=[("x", INT8, (2,))], outputs=[("y", INT8, (2,))]),
            "Add 'the_Add': input 'x' is INT8",
        ),
        (
            model(node("Cast", ["x"], to=DOUBLE), outputs=[("y", DOUBLE, (2, 3))]),
            "Cast 'the_Cast': output 'y' is DOUBLE",
        ),
        (
            model(node("MatMul", ["x", "x"]), inputs=[("x", INT64, (3, 3))], outputs=[("y", INT64, (3, 3))]),
            "MatMul 'the_MatMul': input 'x' is INT64",
        ),
        (
            model(node("ReduceMax", ["x", "a"]), inputs=[("x", FLOAT, (2, 3)), ("a", INT64, (1,))]),
            "ReduceMax 'the_ReduceMax': input 'a' must be a constant",
        ),
        (
            model(
                node("LayerNormalization", ["x", "s"], ["y", "mean"]),
                inputs=[("x", FLOAT, (2, 3)), ("s", FLOAT, (3,))],
            ),
            "LayerNormalization 'the_LayerNormalization': only its first output",
        ),
        (
            model(node("Tanh", ["x"]), inputs=[("x", FLOAT, (1,) * 9)]),
            "Tanh 'the_Tanh': input 'x' has 9 dimensions, taken are at most 8",
        ),
        (
            model(node("Attention", ["x", "x", "x"]), inputs=[("x", FLOAT, (1, 2, 8))], opset=23),
            "Attention 'the_Attention': only Q, K, V and a mask of 4 dimensions",
        ),
        (
            model(node("Attention", ["x", "x", "x"], softcap=2.0), inputs=[("x", FLOAT, (1, 1, 2, 8))], opset=23),
            "Attention 'the_Attention': its attribute softcap",
        ),
        (model(node("Exp", ["x"]), opset=8), "the graph uses opset 8 of ai.onnx, taken are 9 to 24"),
    ],
)
def test_what_it_does_not_take(graph, problem):
    report = check_operators(graph)
    assert any(found.startswith(problem) for found in report.problems), report.problems
    assert not report.to_dict()["supported"]


def test_a_type_that_is_not_known_is_a_problem():
    graph = model(node("Mystery", ["x"], ["z"], domain="our.ops"), node("Exp", ["z"]), domain="our.ops")
    assert any("input 'z' is UNDEFINED" in problem for problem in check_operators(graph).problems)


def test_every_operator_of_the_table_is_of_the_standard():
    for name in TYPES:
        assert onnx.defs.get_schema(name, OPSETS[-1], "").since_version <= OPSETS[-1]
