"""How far a network's predictions are from the fp32 network's, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.specs import Session

from .budget import decibels
from .calls import Call, guided

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class StepNoise:
    """The noise of the predictions at one timestep.

    Attributes:
        timestep: that the network was told.
        signal: sum of squares of the fp32 predictions.
        noise: sum of squares of the differences from them.
    """

    timestep: float
    signal: float
    noise: float

    @property
    def share(self) -> float:
        """Of the noise in the signal's power; infinite where nothing was predicted but noise."""
        if self.signal > 0:
            return self.noise / self.signal
        return math.inf if self.noise > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB."""
        return decibels(self.signal, self.noise)


@dataclass(frozen=True)
class PredictionNoise:
    """The noise of a network's predictions over the timesteps, falling as they are sampled.

    Attributes:
        raw: of every row that the network answers.
        guided: of what guidance makes of them and the sampler is sent: an error that the two rows of a picture do
            not share counts as often as the guidance scale says.
    """

    raw: tuple[StepNoise, ...]
    guided: tuple[StepNoise, ...]


def mean_db(steps: Iterable[StepNoise]) -> float:
    """Mean over the timesteps of the ratio in dB: what the budget `sqnr` bounds. Every timestep counts the same."""
    return float(np.mean([step.sqnr_db for step in steps]))


def share_db(steps: Iterable[StepNoise]) -> float:
    """Ratio in dB that belongs to the mean over the timesteps of noise / signal: what the layers of a plan add up to.

    Timesteps with much noise count most, so it is at most `mean_db`.
    """
    return decibels(1.0, float(np.mean([step.share for step in steps])))


@dataclass
class _Sums:
    """Signal and noise so far, by timestep."""

    raw: dict[float, NDArray[np.float64]] = field(default_factory=dict)
    guided: dict[float, NDArray[np.float64]] = field(default_factory=dict)

    def noise(self) -> PredictionNoise:
        return PredictionNoise(_steps(self.raw), _steps(self.guided))


def prediction_noise(
    calls: Iterable[Call], reference: Session, tested: Mapping[str, Session]
) -> dict[str, PredictionNoise]:
    """The noise of networks, by name, in answering the same calls as the fp32 one.

    Calls are answered one after the other and nothing is kept of them but sums, so that any number may come.

    Args:
        calls: of the network, each at one timestep.
        reference: the fp32 network.
        tested: the same network in other precisions, by name.

    Raises:
        CalibrationError: there is no call, or an answer is NaN or infinite (names precision, prompt and timestep).
        BackendError: a network failed.
    """
    sums = {name: _Sums() for name in tested}
    seen = False
    for call in calls:
        seen = True
        wanted = _answer(reference, call, "fp32")
        wanted_guided = guided(wanted, call)
        for name, session in tested.items():
            got = _answer(session, call, name)
            _add(sums[name].raw, call.timestep, wanted, got)
            _add(sums[name].guided, call.timestep, wanted_guided, guided(got, call))
    if not seen:
        raise CalibrationError("predictions: expected captured calls, got none. Capture with more prompts or steps.")
    return {name: each.noise() for name, each in sums.items()}


def _answer(session: Session, call: Call, name: str) -> Floats:
    answer = session(call.feeds)[session.spec.outputs[0].name].astype(np.float32)
    if not np.isfinite(answer).all():
        raise CalibrationError(
            f"predictions: expected finite numbers of the {name} network, got NaN or infinity for prompt "
            f"{call.prompt} at timestep {call.timestep:g}."
        )
    return answer


def _add(sums: dict[float, NDArray[np.float64]], timestep: float, wanted: Floats, got: Floats) -> None:
    exact = wanted.astype(np.float64)
    own = np.array([np.sum(exact**2), np.sum((got - exact) ** 2)])
    sums[timestep] = sums.get(timestep, 0.0) + own


def _steps(sums: Mapping[float, NDArray[np.float64]]) -> tuple[StepNoise, ...]:
    falling = sorted(sums.items(), reverse=True)
    return tuple(StepNoise(timestep, float(signal), float(noise)) for timestep, (signal, noise) in falling)
