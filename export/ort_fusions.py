"""The operators of ONNX Runtime in the place of patterns: what each of its targets runs faster."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import InPlacePass

from .attention_fusion import AttentionFusionPass
from .channels_last import ChannelsLastPass
from .graph_matching import MICROSOFT
from .group_norm_fusion import GroupNormFusionPass
from .silu_fusion import SiluFusionPass
from .skip_group_norm_fusion import SkipGroupNormFusionPass
from .skip_layer_norm_fusion import SkipLayerNormFusionPass
from .split_gelu_fusion import SplitGeluFusionPass

TARGETS = ("cpu", "cuda")


def fuse(model: ir.Model, target: str) -> dict[str, int]:
    """Rewrite a graph for one of `TARGETS`, in place.

    Args:
        model: in fp32 or fp16, its weights lazy or external; none of them is read here.

    Returns:
        How many of ONNX Runtime's own operators it holds now, by name.
    """
    passes: list[InPlacePass] = [AttentionFusionPass(), SiluFusionPass(), SkipLayerNormFusionPass()]
    if target == "cuda":
        passes += [GroupNormFusionPass(), ChannelsLastPass(), SkipGroupNormFusionPass(), SplitGeluFusionPass()]
    for graph_pass in passes:
        graph_pass(model)
    return fused_operators(model)


def fused_operators(model: ir.Model) -> dict[str, int]:
    """How many of ONNX Runtime's own operators a graph holds, by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph if node.domain == MICROSOFT).items()))
