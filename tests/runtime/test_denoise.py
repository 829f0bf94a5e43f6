"""The loop's own parts, against diffusers and against counting: pictures, guidance, the rows of a call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.runtime import BackendError, ModelSpec, Pipeline, TensorSpec, to_uint8
from latentrt.runtime.bound_inputs import is_frozen
from latentrt.runtime.conditioning import Rows
from latentrt.runtime.denoise import ActiveControl, Denoiser
from latentrt.runtime.guidance import Guidance
from latentrt.runtime.sampler_loop import Evaluation
from latentrt.runtime.specs import Array


class FakeUnet:
    """A U-Net that is a plain function of its inputs, and remembers how it was called."""

    backend = "fake"

    def __init__(self, timestep_shape: tuple[int | str, ...] = ("batch",), value: float = 1.0) -> None:
        self.spec = ModelSpec("unet", (TensorSpec("timestep", "float32", timestep_shape),), ())
        self.value = value
        self.calls: list[dict[str, Array]] = []

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(dict(feeds))
        context = feeds["encoder_hidden_states"].astype(np.float32).mean((1, 2))
        return {"out_sample": self.value * feeds["sample"].astype(np.float32) * context[:, None, None, None]}

    def close(self) -> None:
        """Nothing to give back."""


def evaluation(rows: int = 2) -> Evaluation:
    sample = np.random.default_rng(0).standard_normal((rows, 4, 2, 2)).astype(np.float32)
    return Evaluation(sample=sample, sigma=1.0, timestep=500.0, step_index=3, latents=sample)


class Told:
    """Two images, whose prompts and negative prompts are embeddings of one value each."""

    def __init__(self, value: float, negative: float | None = None) -> None:
        self.value, self.negative = value, negative

    def at(self, position: int, *, guided: bool) -> tuple[Rows, ...]:
        values = [self.value] * 2 if not guided else [self.negative] * 2 + [self.value] * 2
        return (
            Rows(
                images=np.arange(2),
                owner=np.arange(2),
                weights=np.ones(2, np.float32),
                negatives=2 if guided else 0,
                hidden=np.stack([np.full((77, 8), value, np.float32) for value in values]),
                text_embeds=None,
                time_ids=None,
            ),
        )


def guided(unet: Any, value: float, negative: float | None, scale: float) -> Denoiser:
    guidance = Guidance(scale=scale if negative is not None else 1.0)
    return Denoiser(unet=unet, conditioning=Told(value, negative), guidance=guidance, first=0, count=4)


def test_pictures_are_rounded_as_diffusers_rounds_them() -> None:
    import torch
    from diffusers.image_processor import VaeImageProcessor

    sample = np.random.default_rng(1).uniform(-1.3, 1.3, (2, 3, 64, 64)).astype(np.float32)
    unit = VaeImageProcessor().postprocess(torch.from_numpy(sample), output_type="np")
    np.testing.assert_array_equal(to_uint8(sample), (unit * 255).round().astype(np.uint8))


def test_guidance_is_its_formula_in_one_call_of_2b_rows() -> None:
    unet, asked = FakeUnet(), evaluation()
    found = guided(unet, 3.0, 1.0, 5.0)(asked)
    np.testing.assert_allclose(found, asked.sample * (1.0 + 5.0 * (3.0 - 1.0)), rtol=1e-6)
    assert len(unet.calls) == 1
    assert unet.calls[0]["sample"].shape[0] == 4
    np.testing.assert_array_equal(unet.calls[0]["timestep"], np.full(4, 500.0))


def test_without_guidance_a_call_has_b_rows() -> None:
    unet, asked = FakeUnet(), evaluation()
    found = guided(unet, 3.0, None, 5.0)(asked)
    np.testing.assert_allclose(found, asked.sample * 3.0, rtol=1e-6)
    assert unet.calls[0]["sample"].shape[0] == 2


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_guidance_of_1_and_below_is_off(shapes_bundle: Path, guidance: float, rows: int) -> None:
    """It costs half, and the picture is the same: only the rows tell."""
    unet = FakeUnet(value=0.01)
    pipe = Pipeline.load(shapes_bundle)
    pipe.model.components._open["unet"] = unet
    pipe("a red circle", sampler="Euler", steps=2, guidance=guidance)
    assert {call["sample"].shape[0] for call in unet.calls} == {rows}


def test_a_controls_picture_is_the_same_array_at_every_step() -> None:
    """So that a session need not copy it again."""
    pictures = np.random.default_rng(2).random((2, 3, 8, 8), np.float32)
    control = ActiveControl(FakeUnet(), pictures, 1.0, 0.0, 1.0)
    rows = control.rows(np.array([0, 1, 0, 1]))
    assert control.rows(np.array([0, 1, 0, 1])) is rows
    assert is_frozen(rows)
    np.testing.assert_array_equal(rows, np.concatenate([pictures, pictures]))
    np.testing.assert_array_equal(control.rows(np.array([1])), pictures[1:])


@pytest.mark.parametrize(("shape", "wanted"), [((), ()), ((1,), (1,)), (("batch",), (2,))])
def test_the_timestep_has_the_graphs_shape(shape: tuple[int | str, ...], wanted: tuple[int, ...]) -> None:
    """optimum exports a scalar."""
    unet = FakeUnet(shape)
    guided(unet, 1.0, None, 1.0)(evaluation())
    assert unet.calls[0]["timestep"].shape == wanted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stops_the_run(value: float) -> None:
    with pytest.raises(BackendError, match="step 3"):
        guided(FakeUnet(value=value), 1.0, None, 1.0)(evaluation())
