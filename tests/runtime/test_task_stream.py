"""Control over a run: stream, cancel, deadlines, threads, previews, and values that must not pass in silence."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from task_oracle import watched

from latentrt.runtime import BackendError, DeadlineError, Pipeline, StepInfo, UsageError
from latentrt.runtime.latent_preview import fit_latent_rgb
from latentrt.runtime.request import Hires
from latentrt.runtime.specs import Array

PROMPT = "a small red circle on a blue background"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "sampler": "Euler"}


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


def drained(run: Any) -> tuple[list[StepInfo], Any]:
    """Every step, and what the generator returns."""
    result = None

    def watch() -> Generator[StepInfo, None, None]:
        nonlocal result
        result = yield from run

    return list(watch()), result


@pytest.mark.parametrize(("sampler", "count"), [("Euler", 4), ("Heun", 4), ("PLMS", 5), ("UniPC", 4), ("DPM++ 2S", 4)])
def test_steps_come_in_order(sampler: str, count: int, ours: Pipeline) -> None:
    """PLMS takes its second step twice, as in diffusers."""
    steps, result = drained(ours.stream(PROMPT, steps=4, guidance=1.0, **{**SMALL, "sampler": sampler}))
    assert [step.index for step in steps] == list(range(count))
    assert {step.total for step in steps} == {count}
    seconds = [step.seconds for step in steps]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert all(step.latents.shape == (1, 4, 8, 8) for step in steps)
    np.testing.assert_array_equal(steps[-1].latents, result.latents)
    assert result.images.shape == (1, 64, 64, 3)
    assert set(result.seconds) == {"prepare", "denoise", "decode"}


def test_a_stream_is_a_call(ours: Pipeline) -> None:
    settings = {"steps": 3, "seed": 4, **SMALL, "sampler": "Euler a"}
    _, result = drained(ours.stream(PROMPT, **settings))
    called: list[NDArray[Any]] = []
    direct = ours(PROMPT, on_step=lambda step: called.append(step.latents), **settings)
    np.testing.assert_array_equal(result.images, direct.images)
    assert len(called) == 3


def test_nothing_runs_before_the_first_step_is_asked_for(ours: Pipeline) -> None:
    with watched(ours, "unet") as unet:
        run = ours.stream(PROMPT, steps=2, **SMALL)
        assert not unet.feeds
        next(run)
        assert len(unet.feeds) == 1
        run.close()
        assert len(unet.feeds) == 1


def test_latents_of_a_step_stay_what_they_were(ours: Pipeline) -> None:
    """A consumer may keep them, and cannot change the run through them."""
    kept: list[tuple[Array, Array]] = []

    def meddle(step: StepInfo) -> None:
        kept.append((step.latents, step.latents.copy()))
        with pytest.raises(ValueError, match="read-only"):
            step.latents[...] = 0

    ours(PROMPT, steps=4, guidance=1.0, on_step=meddle, **{**SMALL, "sampler": "DPM++ 2M"})
    for held, copied in kept:
        np.testing.assert_array_equal(held, copied)


def test_closing_early_leaves_nothing_behind(ours: Pipeline) -> None:
    settings = {"steps": 4, "seed": 4, **SMALL, "sampler": "DPM++ SDE"}
    wanted = ours(PROMPT, **settings)
    threads = threading.active_count()
    with watched(ours, "vae_decoder") as decoder:
        run = ours.stream(PROMPT, **settings)
        next(run)
        next(run)
        run.close()
        assert not decoder.feeds
        with pytest.raises(StopIteration):
            next(run)
    assert threading.active_count() == threads
    np.testing.assert_array_equal(ours(PROMPT, **settings).images, wanted.images)


def test_raising_from_on_step_cancels(ours: Pipeline) -> None:
    class EnoughError(Exception):
        pass

    def stop(step: StepInfo) -> None:
        if step.index == 1:
            raise EnoughError

    with watched(ours, "unet") as unet, watched(ours, "vae_decoder") as decoder:
        with pytest.raises(EnoughError):
            ours(PROMPT, steps=5, on_step=stop, **SMALL)
        assert len(unet.feeds) == 2
        assert not decoder.feeds
    assert ours(PROMPT, steps=1, **SMALL).images.any()


def test_a_deadline_ends_a_run_between_steps(ours: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with watched(ours, "unet") as unet:
        with pytest.raises(DeadlineError, match=r"deadline: expected to be done within 2\.5 s, .*3\.0 s"):
            ours(PROMPT, steps=5, deadline=2.5, on_step=lambda _: clock.pass_(1.0), **SMALL)
        assert len(unet.feeds) == 3


def test_a_deadline_of_nothing_ends_before_the_first_step(ours: Pipeline) -> None:
    for deadline in (0.0, -1.0, float("nan")):
        with watched(ours, "unet") as unet:
            with pytest.raises(DeadlineError):
                ours(PROMPT, steps=5, deadline=deadline, **SMALL)
            assert not unet.feeds


def test_a_deadline_that_passes_in_the_last_step_wastes_nothing(
    ours: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    result = ours(PROMPT, steps=3, deadline=2.5, on_step=lambda _: clock.pass_(1.0), **SMALL)
    assert result.images.any()


class Clock:
    """The pipeline's clock, which stands still between calls of `pass_`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stop the clock."""
        self.now = 100.0
        monkeypatch.setattr("latentrt.runtime.pipeline.time.perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def test_eight_threads_draw_what_one_draws(ours: Pipeline) -> None:
    """Different prompts, samplers, sizes and lengths at once, each more than once: the bytes of one after another."""
    jobs = [
        (f"a {colour} circle on a white background" + ", plain" * words, sampler, size, seed)
        for seed, (colour, sampler, size, words) in enumerate(
            [
                ("red", "Euler a", 64, 0),
                ("blue", "DPM++ 2M", 64, 90),
                ("green", "UniPC", 96, 0),
                ("yellow", "DPM++ SDE", 64, 0),
            ]
        )
    ] * 4

    def draw(job: tuple[str, str, int, int]) -> NDArray[np.uint8]:
        prompt, sampler, size, seed = job
        barrier.wait(timeout=60)
        return ours(prompt, sampler=sampler, height=size, width=64, steps=3, guidance=4.0, seed=seed).images

    barrier = threading.Barrier(1)
    wanted = [draw(job) for job in jobs[:4]]
    ours.model.prompt_encoder.cache.clear()
    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(draw, jobs))
    for index, images in enumerate(found):
        np.testing.assert_array_equal(images, wanted[index % 4])


def test_previews_have_a_pixel_for_each_latent(ours: Pipeline) -> None:
    previews: list[NDArray[np.uint8]] = []
    ours(PROMPT, steps=2, batch=2, on_step=lambda step: previews.append(step.preview()), **{**SMALL, "width": 96})
    assert [preview.shape for preview in previews] == [(2, 8, 12, 3)] * 2
    assert all(preview.dtype == np.uint8 for preview in previews)


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "Euler"])
def test_a_preview_resembles_the_picture(sampler: str, ours: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own, not the other one of the batch, and from the middle on, where the latents are noise still.

    The colours are fitted here, so that what is tested is what they are applied to.
    """
    prompts = ["a large red circle on a white background", "a large green square on a black background"]
    previews: list[NDArray[np.uint8]] = []
    settings: dict[str, Any] = {"steps": 8, "guidance": 5.0, "seed": 1, "sampler": sampler}
    plain = ours(prompts, **settings)
    fitted = fit_latent_rgb(plain.latents, plain.images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    monkeypatch.setattr("latentrt.runtime.opened_model.Model.latent_rgb", lambda _self: fitted)
    result = ours(prompts, on_step=lambda step: previews.append(step.preview()), **settings)
    small = result.images.reshape(2, 16, 8, 16, 8, 3).mean((2, 4))
    assert len(previews) == 8
    for preview in previews[4:]:
        own = [correlation(preview[i], small[i]) for i in range(2)]
        other = [correlation(preview[i], small[1 - i]) for i in range(2)]
        assert min(own) > 0.55, own
        assert min(own) > max(other) + 0.4, (own, other)


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's, over all values."""
    return float(np.corrcoef(a.astype(float).ravel(), b.astype(float).ravel())[0, 1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_unet_that_fails_is_named_with_step_and_precision(value: float, ours: Pipeline) -> None:
    def spoil(call: int, outputs: dict[str, Array]) -> dict[str, Array]:
        if call < 2:
            return outputs
        broken = np.array(outputs["out_sample"])
        broken[0, 1, 2, 3] = value
        return {"out_sample": broken}

    with watched(ours, "unet", spoil) as unet:
        with pytest.raises(BackendError, match="unet: expected finite values at step 2 in fp32, got NaN or infinity"):
            ours(PROMPT, steps=5, **SMALL)
        assert len(unet.feeds) == 3


def test_a_black_picture_is_refused(ours: Pipeline) -> None:
    """One of two is enough."""

    def blacken(call: int, outputs: dict[str, Array]) -> dict[str, Array]:
        return {"sample": np.full_like(outputs["sample"], -1.0)} if call == 1 else outputs

    with watched(ours, "vae_decoder", blacken), pytest.raises(BackendError, match=r"picture \[1\] of 2: expected more"):
        ours(PROMPT, steps=1, batch=2, **SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_decoder_that_fails_is_named(value: float, ours: Pipeline) -> None:
    def spoil(_call: int, outputs: dict[str, Array]) -> dict[str, Array]:
        broken = np.array(outputs["sample"])
        broken[0, 0, 5, 5] = value
        return {"sample": broken}

    with watched(ours, "vae_decoder", spoil), pytest.raises(BackendError, match=r"vae_decoder.*NaN or infinity"):
        ours(PROMPT, steps=1, **SMALL)


def test_an_encoder_that_fails_is_named(ours: Pipeline) -> None:
    def spoil(_call: int, outputs: dict[str, Array]) -> dict[str, Array]:
        return {"latent_parameters": np.full_like(outputs["latent_parameters"], np.nan)}

    image = np.full((64, 64, 3), 128, np.uint8)
    with watched(ours, "vae_encoder", spoil), pytest.raises(BackendError, match=r"vae_encoder.*NaN or infinity"):
        ours(PROMPT, steps=2, image=image, **SMALL)


def test_a_second_pass_is_streamed_after_the_first(ours: Pipeline) -> None:
    hires = Hires(scale=1.5, strength=0.5, steps=4)
    steps, result = drained(ours.stream(PROMPT, steps=3, guidance=1.0, hires=hires, **SMALL))
    assert [(step.second_pass, step.index, step.total) for step in steps] == [
        (False, 0, 3), (False, 1, 3), (False, 2, 3), (True, 0, 2), (True, 1, 2),
    ]  # fmt: skip
    assert steps[-1].latents.shape == (1, 4, 12, 12)
    assert result.images.shape == (1, 96, 96, 3)


def test_an_unknown_setting_is_found_before_anything_runs(ours: Pipeline) -> None:
    with watched(ours, "unet") as unet:
        with pytest.raises(UsageError, match="stepz: expected a setting such as steps"):
            ours(PROMPT, stepz=3)
        assert not unet.feeds
