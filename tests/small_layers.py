"""Layers of small PyTorch modules, without a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from latentrt.calibrate.layers import Layer, kind_of


def layers_of(module: nn.Module, groups: Mapping[str, str] | None = None) -> tuple[Layer, ...]:
    """The layers of a module, each with an input of its own unless `groups` names the first that reads it."""
    found = []
    for path, each in module.named_modules():
        if isinstance(each, nn.Conv2d | nn.Linear):
            name = f"{path}.weight"
            outputs, inputs, *taps = each.weight.shape
            group = (groups or {}).get(name, name)
            found.append(
                Layer(
                    name=name,
                    operator="Conv" if taps else "MatMul",
                    kind=kind_of(name),
                    input=f"{group}.input",
                    group=group,
                    inputs=inputs,
                    outputs=outputs,
                    taps=math.prod(taps),
                    macs=1,
                    share=0.0,
                )
            )
    return tuple(found)
