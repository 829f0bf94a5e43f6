"""What quantized layers compute, in PyTorch: the arithmetic of `QuantizePass` without a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from latentrt.runtime.errors import CalibrationError

from .layer_quant import Kind, LayerQuant
from .number_formats import LARGEST, half_scale, quantized, weight_scales

_DTYPES: Mapping[Kind, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_NAMED = 10


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as the graph stores it, a quarter of its size.

    Attributes:
        steps: (outputs, inputs, …), int8 or float8.
        scale: (outputs, 1, …), or of all outputs ().
    """

    steps: torch.Tensor
    scale: torch.Tensor

    def restored(self) -> torch.Tensor:
        """What DequantizeLinear makes of it, float32."""
        return self.steps.float() * self.scale


def stored_weight(weight: torch.Tensor, quant: LayerQuant) -> StoredWeight:
    """A layer's weight, its columns multiplied by the smoothing vector, quantized.

    Args:
        weight: (outputs, inputs, …), as PyTorch has it; what comes back is on its device.

    Raises:
        CalibrationError: it holds a NaN, or its scales are beyond float16.
    """
    values = weight.detach().float().cpu().numpy()
    if quant.vector is not None:
        values = values * quant.vector.reshape(1, -1, *(1,) * (values.ndim - 2))
    scales = weight_scales(values, 0, quant.kind)
    # PyTorch knows no float8 of NumPy's, only its bytes.
    steps = torch.from_numpy(quantized(values, scales, 0, quant.kind).view(np.int8)).view(_DTYPES[quant.kind])
    shape = (-1, *(1,) * (values.ndim - 1)) if scales.ndim else ()
    scale = torch.from_numpy(scales.astype(np.float32).reshape(shape))
    return StoredWeight(steps.to(weight.device), scale.to(weight.device))


def rounded(x: torch.Tensor, scale: float, kind: Kind) -> torch.Tensor:
    """What QuantizeLinear and DequantizeLinear leave of a tensor: to the nearest, ties to even, saturated."""
    step = float(half_scale(scale))
    # As a tensor, so that PyTorch divides; by a number, a GPU multiplies with its reciprocal.
    steps = x / torch.tensor(step, device=x.device)
    if kind == "int8":
        return steps.round_().clamp_(-LARGEST[kind] - 1, LARGEST[kind]) * step
    return steps.clamp_(-LARGEST[kind], LARGEST[kind]).to(_DTYPES[kind]).float() * step


def channel_axis(module: nn.Module) -> int:
    """Of what a layer reads and returns."""
    return 1 if isinstance(module, nn.Conv2d) else -1


def divided(x: torch.Tensor, quant: LayerQuant, axis: int) -> torch.Tensor:
    """A layer's input as it is quantized: its channels divided by the smoothing vector."""
    return x if quant.vector is None else x / _along(quant.vector, x, axis)


def fake_quantized(
    module: nn.Module, x: torch.Tensor, quant: LayerQuant, *, weight: StoredWeight | None = None
) -> torch.Tensor:
    """What a layer makes of its input where it is quantized.

    Args:
        module: a Conv2d or Linear in float32.
        x: its input, (b, inputs, h, w) or (…, inputs).
        weight: its `stored_weight`; left out, it is made.

    Returns:
        As the module does: (b, outputs, h', w') or (…, outputs).

    Raises:
        CalibrationError: it is another kind of module.
    """
    if not isinstance(module, (nn.Conv2d, nn.Linear)):
        raise CalibrationError(f"fake_quantized: expected a Conv2d or Linear, got {type(module).__name__}.")
    x = divided(x, quant, channel_axis(module))
    if quant.scale is not None:
        x = rounded(x, quant.scale, quant.kind)
    restored = (stored_weight(module.weight, quant) if weight is None else weight).restored()
    if isinstance(module, nn.Conv2d):
        y: torch.Tensor = module._conv_forward(x, restored, module.bias)
    else:
        y = F.linear(x, restored, module.bias)
    return y if quant.correction is None else y + _along(quant.correction, y, channel_axis(module))


@contextmanager
def simulated(network: nn.Module, quants: Mapping[str, LayerQuant]) -> Iterator[None]:
    """Let a network compute these layers as quantized inside of the `with`; no graph is written.

    Weights are quantized once. They take a quarter of their size beside the network's own, which stay.

    Args:
        network: `Source.wrapper`, its weights at hand: layers are the names of its parameters.
        quants: by layer.

    Raises:
        CalibrationError: a layer is none of the network's.
    """
    modules = modules_named(network, quants)
    stored = {name: stored_weight(modules[name].weight, quant) for name, quant in quants.items()}
    try:
        for name, quant in quants.items():
            modules[name].forward = partial(fake_quantized, modules[name], quant=quant, weight=stored[name])
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


def modules_named(network: nn.Module, names: Mapping[str, Any]) -> dict[str, Any]:
    """The modules whose weights have these names in a network.

    Raises:
        CalibrationError: a name is of no Conv2d or Linear.
    """
    held = {
        f"{path}.weight": module
        for path, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    if unknown := [name for name in names if name not in held]:
        raise CalibrationError(
            f"{type(network).__name__}: expected weights of its layers, got {', '.join(unknown[:_NAMED])}"
            f"{' …' if len(unknown) > _NAMED else ''}. The plan is of another network: calibrate again."
        )
    return {name: held[name] for name in names}


def _along(values: Any, like: torch.Tensor, axis: int) -> torch.Tensor:
    """A vector (n,) that broadcasts along an axis of a tensor."""
    shape = [1] * like.ndim
    shape[axis] = -1
    return torch.from_numpy(np.asarray(values, np.float32)).to(like.device).reshape(shape)
