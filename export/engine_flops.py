"""Floating point operations of a network's layers, from their shapes: a multiplication and an addition are two.

Counted are convolutions and matrix products, those of attention included, which is how the published figures of
Stable Diffusion count: 0.803 TFLOP for SD 1.5's U-Net at 512 pixels and one row, here 0.80327.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def layer_flops(trt: Any, layer: Any) -> int:
    """Operations of one layer; 0 of a kind that is not counted.

    Args:
        layer: of a network whose shapes are all known.
    """
    count = COUNTED.get(layer.type.name)
    return 0 if count is None else count(trt, layer)


def _convolution(trt: Any, layer: Any) -> int:
    # The bindings hand out the base class; a layer's own attributes appear once it is given its real class.
    layer.__class__ = trt.IConvolutionLayer
    channels = tuple(layer.get_input(0).shape)[1] // layer.num_groups
    return int(2 * math.prod(layer.get_output(0).shape) * channels * math.prod(layer.kernel_size_nd))


def _deconvolution(trt: Any, layer: Any) -> int:
    layer.__class__ = trt.IDeconvolutionLayer
    channels = tuple(layer.get_output(0).shape)[1] // layer.num_groups
    return int(2 * math.prod(layer.get_input(0).shape) * channels * math.prod(layer.kernel_size_nd))


def _matrix_product(trt: Any, layer: Any) -> int:
    layer.__class__ = trt.IMatrixMultiplyLayer
    shape = tuple(layer.get_input(0).shape)
    summed = shape[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else shape[-1]
    return int(2 * math.prod(layer.get_output(0).shape) * summed)


def _einsum(trt: Any, layer: Any) -> int:
    layer.__class__ = trt.IEinsumLayer
    terms = layer.equation.replace(" ", "").split("->")[0].split(",")
    sizes = {
        letter: size
        for index, term in enumerate(terms)
        for letter, size in zip(term, layer.get_input(index).shape, strict=True)
    }
    return int(2 * math.prod(sizes.values()))


# By kind of layer.
COUNTED: Mapping[str, Callable[[Any, Any], int]] = {
    "CONVOLUTION": _convolution,
    "DECONVOLUTION": _deconvolution,
    "MATRIX_MULTIPLY": _matrix_product,
    "EINSUM": _einsum,
}
