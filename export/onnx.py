"""ONNX files: written from PyTorch's exporter, stripped of the exporting machine's paths, and checked."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evc_fast.export.graph import Graph
from evc_fast.export.requirements import ExportError, require

if TYPE_CHECKING:
    import onnx

MIN_OPSET = 20  # the first with Gelu
_LARGEST = 2**31 - 1  # of one protobuf message


def export_onnx(graph: Graph, path: Path, *, opset: int = MIN_OPSET) -> onnx.ModelProto:
    """Write ``graph`` as one ONNX file of standard operators, and return what the file holds.

    Raises:
        ExportError: onnx or onnxscript is missing, ``opset`` is out of range, the weights do not fit into one file, or
            the file would hold anything but operators of the ONNX standard.
    """
    onnx = require("onnx")
    require("onnxscript")
    latest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= latest:
        raise ExportError(f"the opset must be from {MIN_OPSET} to {latest}, got {opset}")
    weights = sum(tensor.nbytes for tensor in (*graph.module.parameters(), *graph.module.buffers()))
    if weights > _LARGEST:
        raise ExportError(f"{graph.name} has {weights / 2**30:.1f} GiB of weights, one ONNX file holds less than 2 GiB")
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph.program(),
            dynamo=True,
            opset_version=opset,
            input_names=[spec.name for spec in graph.signature.inputs],
            output_names=[spec.name for spec in graph.signature.outputs],
            dynamic_shapes=graph.dynamic_shapes(),
            verbose=False,
        )
        model = program.model_proto
    _strip(model)
    _check_interface(model, graph)
    onnx.save_model(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not valid ONNX: {' '.join(str(error).split())}") from error
    return model


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float32 in place of bfloat16, its weights still rounded to bfloat16.

    ONNX Runtime has no bfloat16 products on a CPU; so the graph and the weights of a bfloat16 file can still be run.
    """
    onnx = require("onnx")
    source, target = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    wide = onnx.ModelProto()
    wide.CopyFrom(model)

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == source:
            values = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    for value in (*wide.graph.input, *wide.graph.output, *wide.graph.value_info):
        if value.type.tensor_type.elem_type == source:
            value.type.tensor_type.elem_type = target
    for tensor in wide.graph.initializer:
        widen(tensor)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif attribute.name == "to" and attribute.i == source:
                attribute.i = target
    return wide


def _strip(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for debugging: stack traces with the paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def _check_interface(model: onnx.ModelProto, graph: Graph) -> None:
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain})
    if foreign or model.functions:
        names = foreign or sorted(function.name for function in model.functions)
        raise ExportError(f"{graph.name} does not decompose into standard ONNX operators: {', '.join(names)}")
    for side, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        found = [(value.name, _shape(value)) for value in values]
        wanted = [(spec.name, list(spec.shape)) for spec in getattr(graph.signature, side)]
        if found != wanted:
            raise ExportError(f"the ONNX graph of {graph.name} has the {side} {found}, expected {wanted}")


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of optional packages that it does not find, and of what it cannot fold."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
