"""What noise every layer adds to a network's prediction if it is quantized: all layers from one backward pass a call.

An error d of a layer moves the prediction by J d, and with a random probe v of signs the square of v.(J d), which one
gradient tells, is |J d|^2 on average (Hutchinson's estimator). One sum over all of d would be right and far from exact.
So d is taken apart into errors that are not correlated, whose squares add: those of the weights by output channel, and
those of the input by input channel. Within a channel they are correlated, over the positions of a plain background and
over the two rows of a guided picture, and are summed up before they are squared; squared one by one, the noise of a
trained network came out 5 dB too low. More calls, or the same again, make the estimate more exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from latentrt.runtime.errors import CalibrationError, UsageError

from .calls import Call, guided
from .fake_quant import (
    StoredWeight,
    channel_axis,
    divided,
    fake_quantized,
    modules_named,
    rounded,
    simulated,
    stored_weight,
)
from .layer_quant import LayerQuant
from .prediction_noise import StepNoise

Metric = Literal["guided", "raw"]
METRICS: tuple[Metric, ...] = get_args(Metric)

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """The noise of layers, each quantized alone.

    Attributes:
        timesteps: (n,) at which the network was called, falling.
        signal: (n,) sum of squares of the predictions.
        noise: by layer, (n,) sum of squares of what it adds to them.
    """

    timesteps: Numbers
    signal: Numbers
    noise: Mapping[str, Numbers]

    def shares(self, weights: Callable[[float], float] = lambda _timestep: 1.0) -> dict[str, float]:
        """Noise by layer as a share of the signal: the mean over the timesteps, which count by their weights."""
        counts = np.array([weights(float(timestep)) for timestep in self.timesteps])
        counts = counts / counts.sum() / self.signal
        return {name: float(counts @ noise) for name, noise in self.noise.items()}

    def together(self, layers: Iterable[str]) -> tuple[StepNoise, ...]:
        """The noise of layers that are all quantized, by timestep: its power adds."""
        total = sum((self.noise[name] for name in layers), np.zeros(len(self.timesteps)))
        return tuple(
            StepNoise(float(timestep), float(signal), float(noise))
            for timestep, signal, noise in zip(self.timesteps, self.signal, total, strict=True)
        )


def sensitivities(
    network: nn.Module,
    quants: Mapping[str, LayerQuant],
    calls: Iterable[Call],
    *,
    metric: Metric = "guided",
    device: str = "cpu",
    seed: int = 0,
) -> Sensitivities:
    """Estimate the noise of every layer from one backward pass a call.

    Memory: the weights, a quarter of them again, and the activations of one block, for each block is computed anew in
    the backward pass (Chen et al. 2016, arXiv 1604.06174).

    Args:
        network: `Source.wrapper`, with all of its weights on `device`; what it returns is the prediction.
        quants: of the layers that are asked for, by their names.
        calls: of the network.
        metric: noise of the guided prediction, or of all rows that the network answers.
        device: that the inputs are put on.
        seed: of the probes.

    Raises:
        UsageError: no such metric.
        CalibrationError: there is no call, a layer is none of the network's, or a noise is not finite (names layer
            and timestep).
    """
    modules = modules_named(network, quants)
    stored = {name: stored_weight(modules[name].weight, quant) for name, quant in quants.items()}
    sums = _Sums(quants)
    with _checkpointed(network):
        for index, call in enumerate(_judged(calls, metric)):
            generator = torch.Generator().manual_seed(seed + index)
            noise: dict[str, torch.Tensor] = {}
            with _watched(modules, quants, stored, call, noise):
                # Every input, so that time and text embeddings are reached too.
                feeds = {name: values.requires_grad_() for name, values in _feeds(call, device).items()}
                answer = network(**feeds)
                answer.backward(_cotangent(answer.shape, call, generator).to(device))
            signal = float(np.square(_prediction(answer, call)).sum())
            sums.add(call.timestep, signal, {name: float(value) for name, value in noise.items()})
    return sums.result()


def one_at_a_time(
    network: nn.Module,
    quants: Mapping[str, LayerQuant],
    calls: Iterable[Call],
    *,
    metric: Metric = "guided",
    device: str = "cpu",
) -> Sensitivities:
    """Measure the noise of every layer with that layer alone quantized: a call is run as often as there are layers.

    Args and errors are those of `sensitivities`.
    """
    return measured(
        network, {name: {name: quant} for name, quant in quants.items()}, calls, metric=metric, device=device
    )


def measured(
    network: nn.Module,
    plans: Mapping[str, Mapping[str, LayerQuant]],
    calls: Iterable[Call],
    *,
    metric: Metric = "guided",
    device: str = "cpu",
) -> Sensitivities:
    """Measure the noise of whole plans by simulation.

    Args:
        network: as for `sensitivities`; its weights may also be read layer by layer if plans have one layer each.
        plans: the quantized layers of each, by a name of its own, by which the noise is returned.
        calls: of the network.
        metric: noise of the guided prediction, or of all rows that the network answers.
        device: that the inputs are put on.

    Raises:
        UsageError: no such metric.
        CalibrationError: there is no call, a layer is none of the network's, or a noise is not finite (names plan
            and timestep).
    """
    sums = _Sums(plans)
    with torch.inference_mode():
        for call in _judged(calls, metric):
            feeds = _feeds(call, device)
            exact = _prediction(network(**feeds), call)
            noise = {}
            for name, quants in plans.items():
                with simulated(network, quants):
                    noise[name] = float(np.square(_prediction(network(**feeds), call) - exact).sum())
            sums.add(call.timestep, float(np.square(exact).sum()), noise)
    return sums.result()


class _Sums:
    """Signal and noise so far, by timestep."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._powers: dict[float, Numbers] = {}

    def add(self, timestep: float, signal: float, noise: Mapping[str, float]) -> None:
        powers = np.array([signal, *(noise[name] for name in self._names)])
        if not np.isfinite(powers).all():
            where = ("prediction", *self._names)[int(np.argmin(np.isfinite(powers)))]
            raise CalibrationError(
                f"{where}: expected finite noise, got NaN or infinity at timestep {timestep:g}. "
                "Check the checkpoint and the captured inputs."
            )
        self._powers[timestep] = self._powers.get(timestep, 0.0) + powers

    def result(self) -> Sensitivities:
        if not self._powers:
            raise CalibrationError(
                "sensitivity: expected captured calls, got none. Capture with more prompts or steps."
            )
        falling = sorted(self._powers, reverse=True)
        signal, *noise = np.stack([self._powers[timestep] for timestep in falling], axis=1)
        return Sensitivities(np.array(falling), signal, dict(zip(self._names, noise, strict=True)))


def _judged(calls: Iterable[Call], metric: Metric) -> Iterator[Call]:
    """Calls as they are judged: without guidance, every row is a prediction."""
    if metric not in METRICS:
        raise UsageError(f"metric: expected one of {', '.join(METRICS)}, got {metric}.")
    for call in calls:
        yield call if metric == "guided" else dataclasses.replace(call, negatives=0)


def _feeds(call: Call, device: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(values)).to(device) for name, values in call.feeds.items()}


def _prediction(answer: torch.Tensor, call: Call) -> Numbers:
    return guided(answer.detach().float().cpu().numpy(), call).astype(np.float64)


def _cotangent(shape: torch.Size, call: Call, generator: torch.Generator) -> torch.Tensor:
    """The gradient, by the answer's rows, of the guided prediction's product with random signs."""
    rows, *rest = shape
    signs = torch.randint(0, 2, (rows - call.negatives, *rest), generator=generator).float() * 2 - 1
    return torch.cat([(1 - call.guidance) * signs, call.guidance * signs]) if call.negatives else signs


def _noise(
    module: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    gradient: torch.Tensor,
    quant: LayerQuant,
    weight: StoredWeight,
    negatives: int,
) -> torch.Tensor:
    """A layer's noise for one probe: of its weights by output channel, of its input by input channel."""
    axis = channel_axis(module)
    of_weights = fake_quantized(module, x, dataclasses.replace(quant, scale=None), weight=weight) - y
    noise = _power(of_weights * gradient, axis, negatives)
    if quant.scale is not None:
        exact = divided(x, quant, axis)
        back = _input_gradient(module, exact, weight.restored(), gradient)
        noise = noise + _power((rounded(exact, quant.scale, quant.kind) - exact) * back, axis, negatives)
    return noise


def _input_gradient(module: nn.Module, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if not isinstance(module, nn.Conv2d):
        return gradient @ weight
    back: torch.Tensor = conv2d_input(
        x.shape, weight, gradient, module.stride, module.padding, module.dilation, module.groups
    )
    return back


def _power(products: torch.Tensor, axis: int, negatives: int) -> torch.Tensor:
    """The sum of squares, over channels and pictures, of sums over positions and a picture's rows."""
    sums = products.movedim(axis, 1).reshape(len(products), products.shape[axis], -1).sum(2, dtype=torch.float64)
    return (sums[:negatives] + sums[negatives:] if negatives else sums).square().sum()


@contextmanager
def _watched(
    modules: Mapping[str, Any],
    quants: Mapping[str, LayerQuant],
    stored: Mapping[str, StoredWeight],
    call: Call,
    noise: dict[str, torch.Tensor],
) -> Iterator[None]:
    """Have every layer's noise put into `noise` by the backward pass."""

    def look(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # The first pass through a checkpointed block is none that gradients come back to.
        if output.requires_grad:
            x, y = inputs[0].detach(), output.detach()
            output.register_hook(lambda gradient: receive(name, module, x, y, gradient))

    def receive(name: str, module: nn.Module, x: torch.Tensor, y: torch.Tensor, gradient: torch.Tensor) -> None:
        with torch.no_grad():
            noise[name] = _noise(module, x, y, gradient, quants[name], stored[name], call.negatives)

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _checkpointed(network: nn.Module) -> Iterator[None]:
    """Let the blocks of a network of diffusers compute anew in the backward pass what they need there.

    Reentrant: the second computation is then one that gradients come back to, and its layers' errors are kept for a
    block at a time.
    """
    blocks: list[Any] = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
    before = [(block.gradient_checkpointing, vars(block).get("_gradient_checkpointing_func")) for block in blocks]
    again = partial(checkpoint, use_reentrant=True, preserve_rng_state=False)
    try:
        for block in blocks:
            block.gradient_checkpointing, block._gradient_checkpointing_func = True, again
        yield
    finally:
        for block, (enabled, function) in zip(blocks, before, strict=True):
            block.gradient_checkpointing, block._gradient_checkpointing_func = enabled, function
