"""Which tensors float16 cannot hold, found in the float32 values of real runs.

ONNX Runtime's CPU computes many float16 operators in float32 inside, so a run of the fp16 graph there does not show
every overflow that a GPU would have. The fp32 activations do.

What is looked at is every tensor between two operators. Inside of operators, float16 is taken to be safe: tensor cores
sum the products of a convolution or a matrix product in float32; ONNX defines the statistics of LayerNormalization and
GroupNormalization as float32 (`stash_type`); those of an InstanceNormalization, whose squares pass 65504 from 256 on,
are left to the backend, and no GPU was at hand to see. Attention's scores are scaled before their product, so that the
product is a tensor as it is. A norm written out in single operators has its
squares between them, and they are seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt.runtime.errors import ExportError

from .float32_nodes import float32_nodes
from .half_precision import HALF_MAX

# What an activation may grow by under prompts, guidance and seeds that nobody tried. Measured on the shapes checkpoint,
# with two of six runs measured, the others reached 2.2 times (U-Net) and 2.4 times (VAE) as far in the ten largest
# tensors. One tensor too many in float32 costs next to nothing; one too few, the picture.
HEADROOM = 3.0


def half_tensors(model: ir.Model, ranges: Mapping[str, float]) -> dict[str, float]:
    """The ranges of those tensors of an fp32 graph that its fp16 graph would hold in float16.

    Raises:
        ExportError: one of them is NaN or infinite: then float32 does not hold the network either.
    """
    full = float32_nodes(model)
    made = {str(value.name) for node in model.graph if node not in full for value in node.outputs}
    reached = {tensor: largest for tensor, largest in ranges.items() if tensor in made}
    broken = next((tensor for tensor, largest in reached.items() if not np.isfinite(largest)), None)
    if broken is not None:
        raise ExportError(
            f"{model.graph.name}: expected finite activations in fp32, got {reached[broken]} first in {broken} "
            f"({module_of(model, broken)}). The checkpoint's weights do not work: look for damaged ones there."
        )
    return reached


def mixed_keep(model: ir.Model, ranges: Mapping[str, float], *, headroom: float = HEADROOM) -> frozenset[str]:
    """The tensors of an fp32 graph to keep in float32, for `HalfPrecisionPass`; none if fp16 holds all of them.

    Args:
        ranges: max |x| of its tensors over real runs, from `activation_ranges`.
        headroom: how many times larger a tensor may become before it overflows.

    Raises:
        ExportError: an activation is NaN or infinite in fp32.
    """
    limit = HALF_MAX / headroom
    return frozenset(tensor for tensor, largest in half_tensors(model, ranges).items() if not largest <= limit)


def nearest_overflow(model: ir.Model, ranges: Mapping[str, float], *, count: int = 10) -> list[dict[str, Any]]:
    """The tensors nearest to float16's limit, largest first.

    Args:
        ranges: as for `mixed_keep`.

    Returns:
        Of each: `tensor`, `max_abs`, `share` of float16's largest number, and `module`, the network's module that it
        belongs to.

    Raises:
        ExportError: an activation is NaN or infinite in fp32.
    """
    reached = half_tensors(model, ranges)
    return [
        {
            "tensor": tensor,
            "max_abs": reached[tensor],
            "share": reached[tensor] / HALF_MAX,
            "module": module_of(model, tensor),
        }
        for tensor in sorted(reached, key=lambda tensor: reached[tensor], reverse=True)[:count]
    ]


def module_of(model: ir.Model, tensor: str) -> str:
    """The module whose parameter is nearest to a tensor: on the way to it, or else on the way from it.

    Operators have no names that a user knows, parameters do.
    """
    maker = next((node for node in model.graph if any(value.name == tensor for value in node.outputs)), None)
    for backwards in (True, False):
        seen, pending = {maker}, deque([maker])
        while pending:
            node = pending.popleft()
            if node is None:
                continue
            names = (str(value.name) for value in node.inputs if value is not None and value.is_initializer())
            module = next((name.rpartition(".")[0] for name in names if "." in name), None)
            if module is not None:
                return module
            if backwards:
                following = [value.producer() for value in node.inputs if value is not None]
            else:
                following = [reader for value in node.outputs for reader, _ in value.uses()]
            for other in following:
                if other not in seen:
                    seen.add(other)
                    pending.append(other)
    return "unknown"
