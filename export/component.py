"""A component ready for export: the wrapped module, what to trace it with, and its contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec


@dataclass(frozen=True)
class Component:
    """One network of the pipeline.

    Attributes:
        module: takes the inputs of `spec` by name, returns its outputs in order, with no Python-level options left.
        example_inputs: what it is traced with. Dynamic dimensions have sizes that differ from each other and
            from 1, so that the tracer cannot take one for another or for a constant.
        spec: names, dtypes and shapes; a dimension given by name is dynamic.
    """

    module: nn.Module
    example_inputs: Mapping[str, torch.Tensor]
    spec: ModelSpec

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())
