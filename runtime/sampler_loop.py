"""The sampler loop: what a sampler asks for, the model put around a solver, and a driver for one sampler.

`with_model` turns a solver, which asks for denoised latents (or for noise), into a sampler that yields what the model
is to be called with and is sent the model's raw output. `drive` runs one of these; a server can run many together,
row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .errors import ConfigError, UsageError
from .parametrisation import Array, Parametrisation, Quantity, apply_form, combine


@dataclass(slots=True)
class Evaluation:
    """A request for one call of the denoiser. Not to be changed; frozen dataclasses cost a microsecond a field.

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
Between: TypeAlias = Callable[[float, Array], Array]
"""Replaces the latents of an evaluation but the first, f(sigma, latents): what inpainting puts back between steps."""

Correction: TypeAlias = Callable[[Array], Array]
"""Changes a denoised latent, (b, c, h/8, w/8): clipping and dynamic thresholding."""


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
    model: Parametrisation,
    sigma_to_timestep: Callable[[float], float],
    quantity: Quantity = "denoised",
    correct: Correction | None = None,
    between: Between | None = None,
) -> Sampler:
    """The same sampler, asking for the model's raw output at its scaled input instead of for a denoised latent.

    Args:
        solver: asks for `quantity` at latents in the model's space.
        model: how the output is to be read.
        sigma_to_timestep: what the model is told at a noise level between two steps.
        quantity: what the solver is sent: the denoised latent, the noise, or the output as it is.
        correct: applied to the denoised latent before the solver sees it; then whatever it asks for follows from that.
        between: changes the solver's latents between steps, in place: at its first evaluation of a step a solver
            yields the very array it goes on from, and has kept no other copy of it. At further evaluations of a step
            it changes what the model is shown, as diffusers' pipelines do.

    Raises:
        ConfigError: with `between`, if the solver adds noise before it evaluates, so that it cannot be done.
        UsageError: on `send`, if a prediction does not have the shape of the sample it is for.
    """
    try:
        wanted = next(solver)
        started, evaluated = wanted.step_index, False
        while True:
            latents, sigma = wanted.sample, wanted.sigma
            if between is not None and evaluated:
                known = between(sigma, latents)
                if wanted.step_index == started:
                    # Within a step only the model is shown it; the solver goes on from its own.
                    latents = known
                elif latents is not wanted.latents:
                    raise ConfigError(
                        "sampler: expected one that evaluates where its steps start, got one with churn. "
                        "Choose another for inpainting with an ordinary model, or set s_churn to 0."
                    )
                else:
                    np.copyto(latents, known, casting="same_kind")
            started, evaluated = wanted.step_index, True
            scale = model.input_scale(sigma)
            sample = latents if scale == 1 else latents * scale
            timestep = sigma_to_timestep(sigma) if wanted.timestep is None else wanted.timestep
            output = yield Evaluation(sample, sigma, timestep, wanted.step_index, wanted.latents)
            if output.shape != sample.shape:
                raise UsageError(
                    f"prediction: expected shape {sample.shape}, got {output.shape}. "
                    "Send one prediction for each row of the sample, guidance already applied."
                )
            if correct is None:
                answer = apply_form(model.form(quantity, sigma), latents, output)
            else:
                answer = _corrected(model, quantity, correct, latents, output, sigma)
            wanted = solver.send(answer)
    except StopIteration as done:
        result: Array = done.value
        return result
    finally:
        solver.close()


def _corrected(
    model: Parametrisation, quantity: Quantity, correct: Correction, latents: Array, output: Array, sigma: float
) -> Array:
    """The quantity that belongs to the corrected denoised latent."""
    form = model.form("denoised", sigma)
    denoised = correct(apply_form(form, latents, output))
    if quantity == "denoised":
        return denoised
    if quantity == "epsilon":
        alpha, sigma_t = model.levels(sigma)
        return combine((1 / sigma_t, latents), (-alpha / sigma_t, denoised))
    a, b = form
    return combine((-a / b, latents), (1 / b, denoised))


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
