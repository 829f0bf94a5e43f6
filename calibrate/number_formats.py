"""How weights and scales are rounded to what both graphs of a plan hold: float16 scales, int8 or float8 steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from latentrt.export.weights import Values
from latentrt.runtime.errors import CalibrationError

from .layer_quant import Kind

# What a kind is stored as.
STORED: Mapping[Kind, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
# The largest weight in steps. Of int8 the smallest is its negative, so that the two differ in nothing but the sign;
# E4M3 has no infinity, and what is beyond it would become NaN.
LARGEST: Mapping[Kind, int] = {"int8": 127, "fp8": 448}
# The smallest positive float16, which no scale may be below: the parser refuses zero.
LEAST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


def half_scale(values: Values | float) -> Values:
    """Scales as both graphs, in float32 and in float16, can hold them: rounded up to float16.

    Rounded up, no value that was in range leaves it. Weights are to be quantized with the rounded scale; with the
    unrounded one, 20 dB are lost where weights are small.

    Raises:
        CalibrationError: a scale is not finite, or beyond float16.
    """
    wanted = np.maximum(np.asarray(values, np.float64), LEAST_SCALE)
    with np.errstate(over="ignore"):
        near = wanted.astype(np.float16)
        scales = np.where(near.astype(np.float64) < wanted, np.nextafter(near, np.float16(np.inf)), near)
    if not np.isfinite(scales).all():
        raise CalibrationError(
            f"scale: expected finite numbers up to {np.finfo(np.float16).max:g}, got {np.asarray(values).max():g}. "
            "Look for NaN or overflow in the calibration's inputs."
        )
    return np.asarray(scales, np.float16)


def weight_scales(weight: Values, axis: int, kind: Kind = "int8") -> Values:
    """Symmetric scales of a weight, float16, its largest absolute value being the largest step.

    Of int8 one for every output channel, (channels,). Of fp8 one for all, (): a float's steps grow with it, so that
    small channels need no scale of their own, and this is what TensorRT's kernels are made for.
    """
    others = tuple(index for index in range(weight.ndim) if index != axis or kind == "fp8")
    return half_scale(np.abs(weight.astype(np.float32)).max(axis=others) / LARGEST[kind])


def quantized(values: Values, scale: Values, axis: int, kind: Kind = "int8") -> Values:
    """Weights in steps, int8 or float8, rounded to the nearest, ties to even as in QuantizeLinear."""
    shape = [1] * values.ndim
    shape[axis] = -1
    steps = values.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    within = np.clip(np.rint(steps) if kind == "int8" else steps, -LARGEST[kind], LARGEST[kind])
    return np.asarray(within, STORED[kind].numpy())
