"""A checkpoint's networks as PyTorch modules without weights, and ways to run them.

A module is made from its config on the meta device, which takes no memory. To run it, its weights are either read into
memory for a while, or read layer by layer and dropped again, so that a network of gigabytes runs in a few hundred
megabytes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from latentrt.runtime.errors import ConfigError

from .checkpoint_parts import Part
from .state_names import fitted
from .weights import Weight, Weights, as_float32

# Networks with more weights than this run layer by layer.
RESIDENT_BYTES = 512 * 2**20


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Hold back the notes and progress bars of diffusers and transformers, which would bury an error of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
            import transformers

            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
            yield
    finally:
        logging.disable(disabled)


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    Attributes:
        module: as the config describes it, in eval mode, parameters on the meta device, buffers with their values.
        weights: by the module's own names.
    """

    module: nn.Module
    weights: Weights


def open_network(part: Part) -> Network:
    """The network of a part; its weights are not read.

    Raises:
        ConfigError: the library cannot make a network from the config.
        ArtifactError: weights are missing, left over or of another shape.
    """
    return fitted_network(unfilled_module(part), part)


def unfilled_module(part: Part) -> nn.Module:
    """The module that a part's config describes, in eval mode, its parameters on the meta device.

    Raises:
        ConfigError: the library cannot make a network from the config.
    """
    from accelerate import init_empty_weights

    try:
        with libraries_quiet(), init_empty_weights(include_buffers=False):
            module: nn.Module = _maker(part)().eval().requires_grad_(False)
    except Exception as err:
        raise ConfigError(
            f"{part.origin}: expected the config of a {part.model_class}, got one that it cannot be made from: {err}."
        ) from err
    return module


def fitted_network(module: nn.Module, part: Part) -> Network:
    """A module with the weights of a part, which are not read.

    Args:
        module: of the part, or one that holds some of its modules under the names that the part's weights have.

    Raises:
        ArtifactError: weights are missing, left over or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return Network(module, fitted(part.weights, expected, origin=part.origin, model_class=part.model_class))


def _maker(part: Part) -> Callable[[], Any]:
    import diffusers
    import transformers

    config = dict(part.config)
    if part.model_class == "StableDiffusionSafetyChecker":
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

        return lambda: StableDiffusionSafetyChecker(transformers.CLIPConfig.from_dict(config))
    if part.name.startswith("text_encoder"):
        model_class = getattr(transformers, part.model_class)
        return lambda: model_class(transformers.CLIPTextConfig.from_dict(config))
    return lambda: getattr(diffusers, part.model_class).from_config(config)


@contextmanager
def weights_at_hand(*networks: Network, resident: bool = False) -> Iterator[None]:
    """Let the modules of these networks run in float32 inside of the `with`; afterwards they are as before.

    Args:
        networks: to run.
        resident: hold all weights, however large, as backward passes and other devices need it.

    Raises:
        ArtifactError: a weight cannot be read, or holds a NaN.
    """
    with ExitStack() as stack:
        for network in networks:
            size = 4 * sum(int(np.prod(weight.shape)) for weight in network.weights.values())
            large = size > RESIDENT_BYTES and not resident
            stack.enter_context(_streamed(network) if large else _filled(_owners(network), network.weights))
        yield


@contextmanager
def _streamed(network: Network) -> Iterator[None]:
    """The weights of a layer while it runs.

    What modules hold beside their layers, such as a safety checker's concepts, is small, and others read it: it is in
    memory all the time.
    """
    from accelerate.hooks import AlignDevicesHook

    owners = _owners(network)
    layers = {module: names for module, names in owners.items() if next(module.children(), None) is None}
    beside = {module: names for module, names in owners.items() if module not in layers}
    hooks = []
    for module, names in layers.items():

        def fill(module: nn.Module, _: Any, names: Mapping[str, str] = names) -> None:
            _fill(module, names, network.weights)

        def empty(module: nn.Module, _: Any, __: Any, names: Mapping[str, str] = names) -> None:
            _empty(module, names)

        hooks += [module.register_forward_pre_hook(fill), module.register_forward_hook(empty, always_call=True)]
    # By this mark of accelerate's, pipelines of diffusers see that weights at rest are not where inputs belong.
    network.module._hf_hook = AlignDevicesHook(execution_device="cpu")
    try:
        with _filled(beside, network.weights):
            yield
    finally:
        del network.module._hf_hook
        for hook in hooks:
            hook.remove()


@contextmanager
def _filled(owners: Mapping[nn.Module, Mapping[str, str]], weights: Weights) -> Iterator[None]:
    try:
        for module, names in owners.items():
            _fill(module, names, weights)
        yield
    finally:
        for module, names in owners.items():
            _empty(module, names)


def _owners(network: Network) -> dict[nn.Module, dict[str, str]]:
    """Modules that hold parameters or saved buffers themselves -> own name to name in the network."""
    owners: dict[nn.Module, dict[str, str]] = {}
    for path, module in network.module.named_modules():
        prefix = f"{path}." if path else ""
        own = {
            name: prefix + name for name in (*module._parameters, *module._buffers) if prefix + name in network.weights
        }
        if own:
            owners[module] = own
    return owners


def _fill(module: nn.Module, names: Mapping[str, str], weights: Weights) -> None:
    for own, name in names.items():
        _set(module, own, torch_tensor(weights[name]))


def _empty(module: nn.Module, names: Mapping[str, str]) -> None:
    for own in names:
        _set(module, own, getattr(module, own).to("meta"))


def _set(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def torch_tensor(weight: Weight) -> torch.Tensor:
    """A weight's values as PyTorch's networks take them: floats in float32."""
    if weight.dtype == np.float16:  # PyTorch widens on all cores, NumPy on one
        return torch.from_numpy(np.require(weight.read(), requirements=("C", "W"))).float()
    return torch.from_numpy(np.require(as_float32(weight).read(), requirements=("C", "W")))
