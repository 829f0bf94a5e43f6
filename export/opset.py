"""Which ONNX opset. Apart from the exporter, so that choosing one does not import torch."""

from __future__ import annotations

from latentrt.runtime.errors import UsageError

# 18 is the oldest that the dynamo exporter writes and 20 the first with Gelu as one operator: fewer nodes, and no
# Erf chain to round in fp16. From 21 on GroupNormalization replaces the InstanceNormalization form of group norm:
# TensorRT-RTX and ONNX Runtime's CPU take it, but ONNX Runtime's CUDA provider and its fusions know only the older.
DEFAULT_OPSET = 20
OPSETS = (18, 19, 20, 21)


def checked_opset(opset: int | None) -> int:
    """The opset asked for, or the default.

    Raises:
        UsageError: graphs of that opset are not tested here.
    """
    if opset is None:
        return DEFAULT_OPSET
    if opset not in OPSETS:
        raise UsageError(
            f"opset: expected one of {', '.join(map(str, OPSETS))}, got {opset}. "
            f"Leave --opset out for the default, {DEFAULT_OPSET}."
        )
    return opset
