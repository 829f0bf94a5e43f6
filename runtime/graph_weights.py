"""The weights of a graph by the names and in the layout of the network that it was exported from.

An initializer keeps its parameter's name, behind the name of the network. A linear layer's weight lies as its MatMul
reads it, (inputs, outputs); PyTorch has (outputs, inputs). Which of them a weight is tells the node that reads it, not
its shape, which may be square.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError, UsageError
from .half import rounded_half
from .onnx_file import (
    BFLOAT16,
    DTYPES,
    FLOAT,
    FLOAT16,
    OnnxGraph,
    OnnxNode,
    OnnxTensor,
    damage_named,
    read_graph,
    rewritten,
    values_of,
)
from .specs import Array

Floats = NDArray[np.float32]
Shape = tuple[int, ...]
_PREFIXES = ("unet.", "text_encoder.")
_CHANNELS_LAST = "_channels_last"
# From (outputs, height, width, inputs) to PyTorch's (outputs, inputs, height, width), and back.
_FIRST, _LAST = (0, 3, 1, 2), (0, 2, 3, 1)
_BLOCK = 64
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class GraphWeight:
    """One weight of a graph.

    Attributes:
        name: of the initializer.
        parameter: of the network, such as `down_blocks.0.attentions.0.proj_in.weight`.
        shape: that PyTorch has.
        data_type: of the graph: FLOAT, FLOAT16 or BFLOAT16 of `onnx_file`.
        layout: how the graph has it: `plain`, `transposed` or `channels_last`.
    """

    name: str
    parameter: str
    shape: Shape
    data_type: int
    layout: str

    def unlaid(self, values: Array) -> Floats:
        """The graph's values as PyTorch has them, in float32."""
        if self.data_type == BFLOAT16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        if self.layout == "transposed":
            return _transposed(values).astype(np.float32, copy=False)
        floats: Floats = values.astype(np.float32, copy=False)
        return floats.transpose(_FIRST) if self.layout == "channels_last" else floats.reshape(self.shape)

    def laid(self, values: Floats, dims: Shape) -> Array:
        """PyTorch's values as the graph has them, rounded once to its type.

        Args:
            dims: of the initializer.

        Raises:
            UsageError: a value is beyond the type's range.
        """
        rounded = self._rounded(values)
        if self.layout == "transposed":
            rounded = _transposed(rounded)
        elif self.layout == "channels_last":
            rounded = rounded.transpose(_LAST)
        return np.ascontiguousarray(rounded).reshape(dims)

    def _rounded(self, values: Floats) -> Array:
        if self.data_type == FLOAT:
            return values
        if self.data_type == BFLOAT16:  # to nearest, ties to even
            bits = np.ascontiguousarray(values).view(np.uint32)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        if not np.abs(values).max(initial=0) <= _LARGEST:
            raise UsageError(
                f"{self.parameter}: expected weights within {_LARGEST:g}, which float16 holds, got larger ones. "
                "Lower the scale, or use the graphs in fp32."
            )
        return rounded_half(values, np.dtype(np.float16))


def _transposed(values: Array) -> Array:
    """A matrix with its axes exchanged, in blocks that fit the cache: three times as fast as NumPy's own copy."""
    result = np.empty(values.shape[::-1], values.dtype)
    for row in range(0, len(values), _BLOCK):
        result[:, row : row + _BLOCK] = values[row : row + _BLOCK].T
    return result


@dataclass(frozen=True, eq=False)
class GraphWeights:
    """The weights of one graph that can be told apart, by parameter; their values are read when they are asked for."""

    graph: OnnxGraph

    @classmethod
    def open(cls, path: Path) -> GraphWeights:
        """Those of an .onnx file.

        Raises:
            ArtifactError: it is missing or no ONNX graph.
        """
        return cls(read_graph(path))

    @cached_property
    def by_parameter(self) -> Mapping[str, GraphWeight]:
        """Float weights that one node reads, or several in one way."""
        layouts: dict[str, set[str]] = {}
        for node in self.graph.nodes:
            for index, name in enumerate(node.inputs):
                if name in self.graph.tensors:
                    layouts.setdefault(name, set()).add(_layout(node, index))
        found: dict[str, GraphWeight] = {}
        for name, tensor in self.graph.tensors.items():
            weight = _weight(name, tensor, layouts.get(name, set()))
            if weight is not None:
                found[weight.parameter] = weight
        return found

    def read(self, weight: GraphWeight) -> Floats:
        """A weight as PyTorch has it, in float32.

        Raises:
            ArtifactError: the file is damaged.
        """
        return weight.unlaid(values_of(self.graph, weight.name))

    def laid(self, weight: GraphWeight, values: Floats) -> Array:
        """New values for a weight, as the graph has them."""
        return weight.laid(values, self.graph.tensors[weight.name].dims)


def _layout(node: OnnxNode, index: int) -> str:
    """How a node reads a weight at an input; empty where that is not known."""
    if node.op_type == "NhwcConv" and index == 1:
        return "channels_last"
    if node.op_type == "Gemm" and index == 1:
        return "plain" if node.ints.get("transB") else "transposed"
    if node.op_type == "MatMul":
        return "transposed" if index == 1 else ""
    return "plain"


def _weight(name: str, tensor: OnnxTensor, layouts: set[str]) -> GraphWeight | None:
    if len(layouts) != 1 or tensor.data_type not in (FLOAT, FLOAT16, BFLOAT16):
        return None
    (layout,) = layouts
    shape: Shape | None = tensor.dims
    if layout == "transposed":
        shape = tensor.dims[::-1] if len(tensor.dims) == 2 else None
    elif layout == "channels_last":
        shape = tuple(tensor.dims[axis] for axis in _FIRST)
    elif layout == "plain" and len(tensor.dims) == 3 and tensor.dims[1:] == (1, 1):
        shape = tensor.dims[:1]  # of a group norm, laid out for a picture
    parameter = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    if layout == "channels_last":
        parameter = parameter.removesuffix(_CHANNELS_LAST)
    if not layout or shape is None or not parameter.endswith((".weight", ".bias")):
        return None
    return GraphWeight(name, parameter, shape, tensor.data_type, layout)


def stripped_weights(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """The values of a graph's initializers as the graph has them: what an engine without weights is given.

    TensorRT's parser names weights after initializers, and reads them as they lie. bfloat16 comes as 16 bits.

    Args:
        path: the .onnx file that the engine was built from.
        names: of the weights that the engine lacks.

    Raises:
        ArtifactError: the graph has no such initializers, which says that the engine was built from another one.
    """
    graph = read_graph(path)
    names = list(names)
    if missing := [name for name in names if name not in graph.tensors]:
        raise ArtifactError(
            f"{path}: expected the weights that the engine lacks, found {len(names) - len(missing)} of {len(names)}; "
            f"{missing[0]} is none of them. The engine was built from another graph: build it again."
        )
    return {name: values_of(graph, name) for name in names}


def with_weights(
    path: Path, model: bytes | None, weights: Mapping[str, Array]
) -> tuple[bytes | None, dict[str, Array]]:
    """A graph in which some weights are others, for ONNX Runtime.

    Its `add_external_initializers` takes the place of external data alone, and holds names, types and shapes to those
    of the graph. Inline weights are put into the graph's bytes instead: `add_initializer` would do for neither, because
    what the optimizer has folded by then, as fp16 weights on the CPU, keeps the old values without a word.

    Args:
        path: of the .onnx file.
        model: its bytes, if they are not those of the file.
        weights: as the graph has them, by initializer.

    Returns:
        The bytes to load, None for those of the file; and what is left to `add_external_initializers`.

    Raises:
        ArtifactError: the graph is damaged, or has no such weight of that type and shape.
    """
    graph = read_graph(path, model)
    inline: dict[str, tuple[Shape, list[bytes | memoryview]]] = {}
    external: dict[str, Array] = {}
    for name, values in weights.items():
        tensor = graph.tensors.get(name)
        if tensor is None or (tensor.dims, DTYPES.get(tensor.data_type)) != (values.shape, values.dtype):
            held = "none" if tensor is None else f"shape {tensor.dims}"
            raise ArtifactError(
                f"{path}: expected an initializer {name} of {values.dtype} {values.shape}, found {held}."
            )
        if tensor.external:
            external[name] = values
        else:
            inline[name] = values.shape, [values.tobytes()]
    if not inline:
        return model, external
    with damage_named(path):
        return rewritten(graph, inline), external
