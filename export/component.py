"""A component ready for export: the wrapped module, what to trace it with, and its contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from latentrt.runtime.specs import Array, ModelSpec

from .networks import Network
from .weights import Weight, Weights, of_array

# Entries of configs that differ between checkpoints of one architecture.
_UNRELATED = ("architectures", "dtype", "torch_dtype", "transformers_version", "sample_size")


@dataclass(frozen=True)
class Component:
    """One network of the pipeline.

    Attributes:
        module: takes the inputs of `spec` by name, returns its outputs in order, with no Python-level options left.
        example_inputs: what it is traced with. Dynamic dimensions have sizes that differ from each other and
            from 1, so that the tracer cannot take one for another or for a constant.
        spec: names, dtypes and shapes; a dimension given by name is dynamic.
        weights: by the module's own names, for a module on the meta device; those of others are in the module.
        config: what the module was made from, with all defaults. Components of one class and config have one graph.
    """

    module: nn.Module
    example_inputs: Mapping[str, torch.Tensor]
    spec: ModelSpec
    weights: Weights = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def with_weights(self, network: Network) -> Component:
        """The component with the weights of the network that its module wraps."""
        names = {id(tensor): name for name, tensor in network.module.state_dict(keep_vars=True).items()}
        own = dict(self.module.state_dict(keep_vars=True))
        weights = {name: network.weights[names[id(tensor)]] for name, tensor in own.items()}
        return replace(self, weights=weights, config=config_of(network.module))


def config_of(module: Any) -> dict[str, Any]:
    """A network's config with all defaults, without what says nothing about its graph."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in _UNRELATED}


def weights_of(component: Component) -> tuple[dict[str, Weight], dict[str, Array]]:
    """What a component's graph holds: weights by name, and the values of its constant buffers."""
    saved = component.module.state_dict(keep_vars=True)
    weights = component.weights or {name: of_array(tensor.detach().numpy()) for name, tensor in saved.items()}
    buffers = {name: np.asarray(b) for name, b in component.module.named_buffers() if name not in saved}
    return dict(weights), buffers
