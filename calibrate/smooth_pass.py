"""Smoothing in a graph: the inputs of layers divided by vectors, their weights multiplied, the results as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from latentrt.export.graph_values import insert
from latentrt.export.lazy_weight import derived
from latentrt.export.weights import Values
from latentrt.runtime.errors import CalibrationError

from .quantized_tensor import initializer
from .smoothing_sites import Site, Stretch, input_axis, readers_of, sites_of

Vector = NDArray[np.float32]
_NAMED = 10


class SmoothPass(InPlacePass):
    """Divide what layers read by a vector, channel by channel, and multiply the columns of their weights with it.

        before   LayerNormalization(x, scale, bias) -> MatMul(w)
        after    LayerNormalization(x, scale / v, bias / v) -> MatMul(v w)

        before   x -> Conv(w)
        after    x -> Mul(1 / v) -> Conv(v w)

    The first wherever `smoothing_sites` finds weights to divide: scale and bias of a norm, the projection to an
    attention's values, the half of a projection that a gate multiplies. The network computes what it did, but for the
    last bits; weights keep their names, and their values are computed when they are read. Comes before `QuantizePass`,
    which divides a concatenation by branch where the Mul does, and after `BiasCorrectionPass`, whose corrections are of
    the biases as they were. SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438).

    Args:
        vectors: (channels,) by group, finite and positive.

    Raises:
        CalibrationError: a group has no site in the graph, or a vector is of another length, or holds what is no
            positive number.
    """

    def __init__(self, vectors: Mapping[str, Vector]) -> None:
        super().__init__()
        self.vectors = vectors

    def call(self, model: ir.Model) -> PassResult:
        """Smooth the groups that have a vector; `modified` says whether there was one."""
        graph = model.graph
        sites = sites_of(model)
        if unknown := sorted(self.vectors.keys() - sites.keys()):
            raise CalibrationError(
                f"{graph.name}: expected vectors of tensors that layers read, by the first layer's weight, got "
                f"{', '.join(unknown[:_NAMED])}{' …' if len(unknown) > _NAMED else ''}. The plan is of another graph: "
                "calibrate again."
            )
        for group, vector in self.vectors.items():
            _check(group, vector, sites[group])
        readers = readers_of(graph)
        for group, vector in self.vectors.items():
            for node in readers[group]:
                weight = node.inputs[1]
                assert weight is not None
                _scale(graph, Stretch(str(weight.name), input_axis(node)), vector)
            for stretch in sites[group].divided:
                _scale(graph, stretch, _reciprocal(vector))
            if not sites[group].free:
                _multiply(graph, readers[group], vector)
        return PassResult(model, modified=bool(self.vectors))


def _check(group: str, vector: Vector, site: Site) -> None:
    if vector.shape != (site.channels,):
        raise CalibrationError(
            f"{group}: expected a vector of {site.channels} channels, got {vector.shape}. The plan is of another "
            "graph: calibrate again."
        )
    if not (np.isfinite(vector) & (vector > 0)).all():
        raise CalibrationError(
            f"{group}: expected a vector of positive numbers, got {float(vector.min()):g} to {float(vector.max()):g}."
        )


def _reciprocal(vector: Vector) -> Values:
    return np.asarray(1 / vector.astype(np.float64), np.float64)


def _scale(graph: ir.Graph, stretch: Stretch, factors: Values) -> None:
    """Multiply a stretch of an initializer, (…, channels, …), by (channels,)."""
    value = graph.initializers[stretch.name]
    tensor = value.const_value
    assert tensor is not None

    def scaled(values: Values) -> Values:
        result = np.moveaxis(values.astype(np.float64), stretch.axis, -1).copy()
        result[..., stretch.start : stretch.start + len(factors)] *= factors
        return np.moveaxis(result, -1, stretch.axis).astype(values.dtype)

    value.const_value = derived([tensor], scaled, shape=tensor.shape.numpy(), dtype=tensor.dtype, name=stretch.name)


def _multiply(graph: ir.Graph, readers: Sequence[ir.Node], vector: Vector) -> None:
    """Let the readers of a tensor read it times the reciprocal of a vector."""
    data = readers[0].inputs[0]
    assert data is not None
    assert data.dtype is not None
    # A Conv has its channels before height and width.
    factors = _reciprocal(vector).reshape(-1, 1, 1) if readers[0].op_type == "Conv" else _reciprocal(vector)
    name = f"{data.name}.smoothed"
    constant = initializer(graph, ir.tensor(factors.astype(data.dtype.numpy()), name=f"{name}.factors"))
    product = insert(graph, "Mul", [data, constant], before=readers[0], name=name, shape=data.shape, dtype=data.dtype)
    for node in readers:
        node.replace_input_with(0, product)
