"""Whether TensorRT's ONNX parser takes a graph, from what it documents: known without TensorRT.

The facts are those of the parser's operator list for TensorRT 10.15, of the operators that our graphs hold or may come
to hold: an operator that is not here is reported, whether or not TensorRT knows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evc_fast.export.requirements import require

if TYPE_CHECKING:
    import onnx

TENSORRT_VERSION = "10.15"
OPSETS = range(9, 25)
MAX_RANK = 8

_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBERS = _FLOATS | {"INT32", "INT64"}
_ALL = _NUMBERS | {"BOOL"}
_BOOL = frozenset({"BOOL"})

# Operator to the types of its tensors.
TYPES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("Erf", "Exp", "Log", "Sqrt", "Tanh", "Sigmoid", "Reciprocal", "Floor", "Ceil", "Clip"), _FLOATS),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "MatMul", "Gemm", "Conv", "Einsum"), _FLOATS),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Pow", "Neg", "Abs", "Sign", "Relu"), _NUMBERS),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"), _NUMBERS),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "Range", "Pad"), _NUMBERS),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _NUMBERS),
    **dict.fromkeys(("Concat", "Split", "Slice", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"), _ALL),
    **dict.fromkeys(("Shape", "Size", "Expand", "Tile", "Gather", "GatherElements", "GatherND", "Identity"), _ALL),
    **dict.fromkeys(("Cast", "Constant", "ConstantOfShape", "Trilu", "Where"), _ALL),
    **dict.fromkeys(("And", "Or", "Xor", "Not"), _BOOL),
    "Gelu": _NUMBERS,
    "Attention": _FLOATS | _BOOL,  # its mask may be BOOL
}
# Operators whose result has a type of its own.
_RESULTS = {
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), _BOOL),
    **dict.fromkeys(("Shape", "Size"), frozenset({"INT64"})),
}
# Inputs, by position, that must be known when the engine is built.
_CONSTANT_INPUTS = {
    **{name: (1,) for name in TYPES if name.startswith("Reduce")},
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
_ONE_OUTPUT = ("LayerNormalization", "Attention")
_ATTENTION_INPUTS = 4  # Q, K, V and a mask, each of 4 dimensions; no cache
_ATTENTION_ATTRIBUTES = ("softcap", "qk_matmul_output_mode")


@dataclass(frozen=True)
class OperatorReport:
    """``operators``: how many nodes of each. ``problems``: one clause for each reason why the parser would refuse."""

    operators: dict[str, int]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"parser": f"TensorRT {TENSORRT_VERSION}", "supported": not self.problems, "problems": self.problems}


def check_operators(model: onnx.ModelProto) -> OperatorReport:
    """Hold every node of ``model`` against the table. Raises ExportError where onnx is not installed."""
    onnx = require("onnx")
    problems = [
        f"the graph uses opset {used.version} of {used.domain or 'ai.onnx'}, taken are {OPSETS[0]} to "
        f"{OPSETS[-1]} of ai.onnx"
        for used in model.opset_import
        if used.domain not in ("", "ai.onnx") or used.version not in OPSETS
    ]
    if model.functions:
        problems.append(f"the model has local functions: {', '.join(sorted({f.name for f in model.functions}))}")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    values = _Values(inferred.graph, onnx.TensorProto.DataType.Name)
    for node in inferred.graph.node:
        problems += [f"{node.op_type} {node.name!r}: {problem}" for problem in _problems(node, values)]
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return OperatorReport(dict(sorted(counts.items())), problems)


class _Values:
    """Type, rank and constancy of every tensor in a graph."""

    def __init__(self, graph: onnx.GraphProto, name_of_type: Any) -> None:
        described = [*graph.input, *graph.value_info, *graph.output]
        self.types = {value.name: name_of_type(value.type.tensor_type.elem_type) for value in described}
        self.types |= {tensor.name: name_of_type(tensor.data_type) for tensor in graph.initializer}
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in described}
        self.ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        self.constants = {tensor.name for tensor in graph.initializer}
        self.constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}


def _problems(node: onnx.NodeProto, values: _Values) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx") or node.op_type not in TYPES:
        yield f"TensorRT {TENSORRT_VERSION} is not known to take this operator"
        return
    taken = TYPES[node.op_type]
    sides = (("input", node.input, taken), ("output", node.output, _RESULTS.get(node.op_type, taken)))
    for side, names, types in sides:
        for name in filter(None, names):  # an optional input that is left out has an empty name
            found = values.types.get(name, "UNDEFINED")
            if found not in types:
                yield f"{side} {name!r} is {found}, taken are {', '.join(sorted(types))}"
            if values.ranks.get(name, 0) > MAX_RANK:
                yield f"{side} {name!r} has {values.ranks[name]} dimensions, taken are at most {MAX_RANK}"
    for position in _CONSTANT_INPUTS.get(node.op_type, ()):
        if position < len(node.input) and node.input[position] and node.input[position] not in values.constants:
            yield f"input {node.input[position]!r} must be a constant"
    if node.op_type == "Attention":
        if any(node.input[_ATTENTION_INPUTS:]) or any(values.ranks.get(name) != 4 for name in filter(None, node.input)):
            yield "only Q, K, V and a mask of 4 dimensions are supported"
        for attribute in node.attribute:
            if attribute.name in _ATTENTION_ATTRIBUTES and (attribute.f or attribute.i):
                yield f"its attribute {attribute.name} is not supported"
    if node.op_type in _ONE_OUTPUT and len([name for name in node.output if name]) > 1:
        yield "only its first output is supported"
