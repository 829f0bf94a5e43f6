import weakref
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.calibrate.budget import LARGEST_DB
from latentrt.calibrate.calls import Call
from latentrt.calibrate.prediction_noise import StepNoise, mean_db, prediction_noise, share_db
from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.specs import Array, ModelSpec, TensorSpec

Answer = Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.floating]]
SHAPE = (2, 4, 4)


class Network:
    """A session whose answer is a function of sample and timestep."""

    spec = ModelSpec("unet", (), (TensorSpec("out_sample", "float32", ("b", *SHAPE)),))
    backend = "a function"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        sample, timestep = (np.asarray(feeds[name], np.float32) for name in ("sample", "timestep"))
        return {"out_sample": self.answer(sample, timestep)}

    def close(self) -> None:
        pass


IDENTITY = Network(lambda sample, timestep: sample)


def call(timestep: float, sample: NDArray[np.float32], *, negatives: int = 0, guidance: float = 1.0) -> Call:
    feeds = {"sample": sample, "timestep": np.full(len(sample), timestep, np.float32)}
    return Call(feeds, prompt=7, timestep=timestep, negatives=negatives, guidance=guidance)


def samples(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("share", [0.5, 0.1, 1e-3])
def test_a_known_share_of_noise_is_found(share: float) -> None:
    scaled = Network(lambda sample, timestep: sample * np.float32(1 + share))
    found = prediction_noise([call(t, samples(3)) for t in (900, 10)], IDENTITY, {"int8": scaled})["int8"]
    assert [step.timestep for step in found.raw] == [900, 10]
    np.testing.assert_allclose([step.sqnr_db for step in found.raw], -20 * np.log10(share), atol=1e-3)
    assert found.raw == found.guided  # nothing was guided


@settings(max_examples=25, deadline=None)
@given(st.floats(1.5, 15.0), st.integers(1, 3))
def test_guidance_amplifies_what_the_rows_do_not_share(guidance: float, prompts: int) -> None:
    # Noise e in the positive rows alone is guidance · e in what is guided; shared by both it stays e.
    sample, noise = samples(2 * prompts), samples(prompts, seed=1)
    alone = np.concatenate([np.zeros_like(noise), noise])
    shared = np.concatenate([noise, noise])
    noisy = {
        "alone": Network(lambda given, _: given + alone),
        "shared": Network(lambda given, _: given + shared),
    }
    found = prediction_noise([call(500, sample, negatives=prompts, guidance=guidance)], IDENTITY, noisy)
    power = float(np.sum(noise.astype(np.float64) ** 2))
    assert found["alone"].guided[0].noise == pytest.approx(guidance**2 * power, rel=1e-4)
    assert found["shared"].guided[0].noise == pytest.approx(power, rel=1e-4)
    assert found["alone"].raw[0].noise == pytest.approx(power, rel=1e-4)
    negative, positive = sample[:prompts].astype(np.float64), sample[prompts:]
    signal = float(np.sum((negative + guidance * (positive - negative)) ** 2))
    assert found["alone"].guided[0].signal == pytest.approx(signal, rel=1e-4)


def test_calls_of_a_timestep_are_summed_before_the_ratio() -> None:
    noisy = Network(lambda sample, timestep: sample + np.float32(0.5))
    quiet, loud = np.ones((1, *SHAPE), np.float32), np.full((3, *SHAPE), 10, np.float32)
    found = prediction_noise([call(5, quiet), call(5, loud)], IDENTITY, {"x": noisy})["x"].raw
    assert len(found) == 1
    assert found[0].sqnr_db == pytest.approx(10 * np.log10((1 + 3 * 100) / (4 * 0.25)))


def test_the_mean_takes_decibels_and_the_share_takes_noise() -> None:
    steps = [StepNoise(900, signal=100.0, noise=1.0), StepNoise(10, signal=1.0, noise=1e-4)]
    assert mean_db(steps) == pytest.approx(30)
    assert share_db(steps) == pytest.approx(-10 * np.log10((1e-2 + 1e-4) / 2))


def test_noise_without_a_signal_is_all_that_there_is() -> None:
    assert share_db([StepNoise(900, signal=0.0, noise=1.0), StepNoise(10, signal=1.0, noise=0.0)]) == -LARGEST_DB
    assert share_db([StepNoise(900, signal=0.0, noise=0.0)]) == LARGEST_DB


def test_equal_networks_are_as_good_as_json_can_say() -> None:
    found = prediction_noise([call(5, samples(2))], IDENTITY, {"same": IDENTITY})["same"]
    assert mean_db(found.guided) == share_db(found.raw) == LARGEST_DB


def test_calls_are_not_kept() -> None:
    seen: list[weakref.ref[Call]] = []
    alive: list[int] = []

    def calls() -> Iterator[Call]:
        for timestep in range(20, 0, -1):
            own = call(timestep, samples(2))
            seen.append(weakref.ref(own))
            yield own
            del own
            alive.append(sum(each() is not None for each in seen))

    prediction_noise(calls(), IDENTITY, {"twice": Network(lambda sample, timestep: sample * 2)})
    assert len(alive) == 20
    assert max(alive) <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_named(value: float) -> None:
    def answer(sample: NDArray[np.float32], timestep: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.where(timestep.reshape(-1, 1, 1, 1) == 10, np.float32(value), sample)

    with pytest.raises(CalibrationError, match=r"of the int8 network, got NaN or infinity for prompt 7 at timestep 10"):
        prediction_noise([call(t, samples(1)) for t in (900, 10)], IDENTITY, {"int8": Network(answer)})


def test_no_call_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="expected captured calls, got none"):
        prediction_noise([], IDENTITY, {"int8": IDENTITY})
