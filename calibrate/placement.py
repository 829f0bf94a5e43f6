"""Whether QuantizeLinear and DequantizeLinear in a graph are what TensorRT takes, and where it is fast with them.

Rules of NVIDIA's "Q/DQ Layer-Placement Recommendations", and what TensorRT-RTX's parser and builder were seen to
refuse.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from latentrt.export.graph_values import is_weight
from latentrt.export.static_shapes import static_graph
from latentrt.export.weights import Values

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# What has weights, and where: the operators whose integer kernels there are.
_WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_STORED = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
# Between a pair and what reads it, these move or join elements and keep their steps.
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Concat", "Gather", "Identity")
_NAMED = 3


@dataclass(frozen=True)
class Placement:
    """What is quantized in a graph, and what is wrong with it.

    Attributes:
        problems: what TensorRT refuses, or computes otherwise than the graph says.
        warnings: what costs time, or quality, and is taken.
        quantized: operators with weights that compute in quantized types, by operator.
        total: all operators with weights, by operator.
        macs: the quantized ones' share of all multiplications; None where no sizes were given.
    """

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    quantized: Mapping[str, int]
    total: Mapping[str, int]
    macs: float | None


@dataclass
class _Findings:
    """Nodes by what is wrong with them, in the graph's order."""

    by_text: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, text: str, node: ir.Node) -> None:
        self.by_text[text].append(str(node.name or node.outputs[0].name))

    def listed(self) -> tuple[str, ...]:
        """One line for each, with the first nodes."""
        return tuple(
            f"{text}: {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if len(names) > _NAMED else ''}"
            for text, names in self.by_text.items()
        )


def check_placement(model: ir.Model, sizes: Mapping[str, int] | None = None) -> Placement:
    """Hold a graph's Q/DQ nodes to TensorRT's rules; it may be ours, ModelOpt's or ONNX Runtime's.

    Args:
        sizes: of every dimension that the graph's inputs name, to count multiplications for.

    Raises:
        UsageError: a size is missing or is of no dimension.
    """
    problems, warnings = _Findings(), _Findings()
    pairs: dict[ir.Value, int] = defaultdict(int)
    for node in model.graph:
        if node.op_type in (_QUANTIZE, _DEQUANTIZE):
            _check_node(node, problems)
        if node.op_type == _QUANTIZE and (data := node.inputs[0]) is not None:
            pairs[data] += not _joined(node)
            _check_readers(node, warnings)
    for data, count in pairs.items():
        if count > 1:
            readers = [reader for reader, _ in data.uses() if reader.op_type == _QUANTIZE]
            warnings.add("one tensor quantized more than once", readers[0])
    quantized, total = Counter[str](), Counter[str]()
    for node in _weighted(model.graph):
        total[node.op_type] += 1
        quantized[node.op_type] += _computes_quantized(node)
    macs = None if sizes is None else _share(static_graph(model, sizes).graph)
    return Placement(problems.listed(), warnings.listed(), +quantized, total, macs)


def _check_node(node: ir.Node, problems: _Findings) -> None:
    """What has to be so of a QuantizeLinear or DequantizeLinear by itself."""
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    values = _constant(scale)
    if values is None:
        problems.add("a scale that is computed in the run, which crashes TensorRT-RTX", node)
    elif not (np.isfinite(values.astype(np.float64)).all() and (values.astype(np.float64) > 0).all()):
        problems.add("a scale that is not a positive number", node)
    zeros = _constant(zero)
    if zero is not None and (zeros is None or zeros.astype(np.float64).any()):
        problems.add("a zero point that is not 0, where TensorRT knows symmetric quantization only", node)
    stored = node.outputs[0] if node.op_type == _QUANTIZE else node.inputs[0]
    kind = stored.dtype if stored is not None else None
    if kind is None and zero is not None:
        kind = zero.dtype
    if kind == ir.DataType.INT32:
        problems.add("an int32 bias with a scale, which TensorRT refuses: leave biases as they are", node)
    elif kind is not None and kind not in _STORED:
        problems.add(f"{kind.name.lower()}, which TensorRT has no kernels for", node)
    data = node.inputs[0] if node.op_type == _QUANTIZE else node.outputs[0]
    if data is not None and scale is not None and None not in (data.dtype, scale.dtype) and data.dtype != scale.dtype:
        problems.add("a scale of another type than what it scales", node)


def _check_readers(node: ir.Node, warnings: _Findings) -> None:
    """What may read a tensor that was quantized."""
    for reader in _floats_readers(node.outputs[0]):
        if reader.op_type == _QUANTIZE:
            continue
        if reader.op_type not in _WEIGHTED:
            warnings.add(f"{reader.op_type} with quantized inputs, slower than with half ones in this network", node)
        elif not _computes_quantized(reader):
            warnings.add(
                f"{reader.op_type} with one input quantized and one not, computed in floats all the same", node
            )


def _floats_readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads the dequantized values of a quantized tensor, behind moves."""
    for reader, _ in value.uses():
        if reader.op_type in (_DEQUANTIZE, *_MOVES):
            yield from _floats_readers(reader.outputs[0])
        else:
            yield reader


def _joined(node: ir.Node) -> bool:
    """Whether a QuantizeLinear is of a branch, whose integers are joined with those of others."""
    return any(reader.op_type == "Concat" for reader, _ in node.outputs[0].uses())


def _constant(value: ir.Value | None) -> Values | None:
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    maker = value.producer()
    if maker is not None and maker.op_type == "Constant" and (held := maker.attributes.get("value")) is not None:
        return held.as_tensor().numpy()
    # ModelOpt's graphs cast constant scales.
    return _constant(maker.inputs[0]) if maker is not None and maker.op_type in ("Cast", "Identity") else None


def _comes_quantized(value: ir.Value | None) -> bool:
    """Whether a value is a DequantizeLinear's, moved or not."""
    maker = value.producer() if value is not None else None
    while maker is not None and maker.op_type in _MOVES and maker.inputs:
        source = maker.inputs[0]
        maker = source.producer() if source is not None else None
    return maker is not None and maker.op_type == _DEQUANTIZE


def _is_fixed(value: ir.Value | None) -> bool:
    """Whether a value is a weight, stored quantized or as it was."""
    if value is None or is_weight(value):
        return value is not None
    maker = value.producer()
    moved = (_QUANTIZE, _DEQUANTIZE, *_MOVES)
    return maker is not None and maker.op_type in moved and bool(maker.inputs) and _is_fixed(maker.inputs[0])


def _weighted(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.domain == "" and node.op_type in _WEIGHTED and _is_fixed(node.inputs[1]):
            yield node


def _computes_quantized(node: ir.Node) -> bool:
    return all(_comes_quantized(value) for value in node.inputs[:2])


def _share(graph: ir.Graph) -> float | None:
    """Of the multiplications of all operators with weights, those of the quantized ones."""
    macs = {node: _macs(node) for node in _weighted(graph)}
    total = sum(macs.values())
    return sum(count for node, count in macs.items() if _computes_quantized(node)) / total if total else None


def _macs(node: ir.Node) -> int:
    shapes = [value.shape.numpy() if value is not None and value.shape is not None else () for value in node.inputs]
    out = node.outputs[0].shape
    made = math.prod(out.numpy()) if out is not None else 0
    if node.op_type == "Conv":
        return made * math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    return made * int(shapes[0][0 if node.attributes.get_int("transA", 0) else -1])
