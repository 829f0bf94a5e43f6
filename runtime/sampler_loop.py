"""The sampler loop: what a sampler asks for, the model put around a solver, and a driver for one sampler.

`with_model` turns a solver, which asks for denoised latents, into a sampler that yields what the model is to be called
with and is sent the model's raw output. `drive` runs one of these; a server can run many together, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

from .errors import UsageError
from .noise_schedule import PredictionType
from .parametrisation import Array, Space, scale_model_input, to_denoised


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A request for one call of the denoiser.

    Attributes:
        sample: where it is to be evaluated, (b, c, h/8, w/8); after `with_model`, the model's scaled input.
        sigma: noise-to-signal ratio of `sample`.
        timestep: what the model is told; None, for a point between two steps, has it derived from `sigma`.
        step_index: the step this is part of. Solvers of several evaluations a step yield the same index again.
        latents: the latent this step started from. At the first evaluation of step i it is the result of step i - 1.
    """

    sample: Array
    sigma: float
    timestep: float | None
    step_index: int
    latents: Array


Sampler: TypeAlias = Generator[Evaluation, Array, Array]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What `drive` reports after a step: its last evaluation, what was sent for it, and the latent it led to."""

    evaluation: Evaluation
    prediction: Array
    latents: Array

    @property
    def index(self) -> int:
        """Index of the finished step."""
        return self.evaluation.step_index


def with_model(
    solver: Sampler,
    *,
    space: Space,
    prediction_type: PredictionType,
    sigma_to_timestep: Callable[[float], float],
) -> Sampler:
    """The same sampler, asking for the model's raw output at its scaled input instead of for a denoised latent.

    Raises:
        UsageError: on `send`, if a prediction does not have the shape of the sample it is for.
    """
    try:
        wanted = next(solver)
        while True:
            sample = scale_model_input(wanted.sample, wanted.sigma, space)
            timestep = sigma_to_timestep(wanted.sigma) if wanted.timestep is None else wanted.timestep
            prediction = yield Evaluation(sample, wanted.sigma, timestep, wanted.step_index, wanted.latents)
            if prediction.shape != sample.shape:
                raise UsageError(
                    f"prediction: expected shape {sample.shape}, got {prediction.shape}. "
                    "Send one prediction for each row of the sample, guidance already applied."
                )
            wanted = solver.send(to_denoised(prediction, sample, wanted.sigma, prediction_type))
    except StopIteration as done:
        latents: Array = done.value
        return latents
    finally:
        solver.close()


def drive(sampler: Sampler, predict: Callable[[Evaluation], Array]) -> Generator[StepResult, None, Array]:
    """Run a sampler with `predict`, report after each step, and return the final latent.

    To stop early, stop iterating or close this generator; the sampler is closed with it.
    """
    try:
        try:
            evaluation = next(sampler)
        except StopIteration as done:
            untouched: Array = done.value
            return untouched
        while True:
            prediction = predict(evaluation)
            try:
                following = sampler.send(prediction)
            except StopIteration as done:
                latents: Array = done.value
                yield StepResult(evaluation, prediction, latents)
                return latents
            if following.step_index != evaluation.step_index:
                yield StepResult(evaluation, prediction, following.latents)
            evaluation = following
    finally:
        sampler.close()
