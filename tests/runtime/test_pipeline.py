"""The runtime beside diffusers' own pipeline: the same checkpoint, prompt and seed, whole arrays, every step."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.runtime import ArtifactError, Pipeline, UsageError, open_bundle

PROMPT = "a small red circle on a blue background"
STEPS = 20

# Ours by A1111's name, and the diffusers class with the options that mean the same.
SAMPLERS: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    # diffusers' DDIM would clip the latents to [-1, 1] unless told otherwise; Stable Diffusion is never run so.
    "DDIM": (None, "DDIMScheduler", {"clip_sample": False}),
    "Euler": (None, "EulerDiscreteScheduler", {}),
    "Euler a": (None, "EulerAncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "PLMS": (None, "PNDMScheduler", {}),
}


@pytest.fixture(scope="module")
def reference(shapes_checkpoint: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(shapes_checkpoint, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


def diffusers_run(
    pipe: Any, scheduler: str, options: dict[str, Any], **arguments: Any
) -> tuple[list[NDArray[np.float32]], NDArray[np.uint8]]:
    """Latents after every step and the pictures, of diffusers."""
    import diffusers

    original = pipe.scheduler
    latents: list[NDArray[np.float32]] = []

    def keep(_pipe: Any, _index: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return values

    try:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(original.config, **options)
        images = pipe(callback_on_step_end=keep, output_type="np", **arguments).images
    finally:
        pipe.scheduler = original
    return latents, (images * 255).round().astype(np.uint8)


def relative_l2(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_that_of_diffusers(sampler: str, ours: Pipeline, reference: Any) -> None:
    import torch

    schedule, scheduler, options = SAMPLERS[sampler]
    wanted, pictures = diffusers_run(
        reference, scheduler, options, prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(42),
    )  # fmt: skip
    found: list[NDArray[np.float32]] = []
    result = ours(
        PROMPT, sampler=sampler, schedule=schedule, steps=STEPS, guidance=5.0, seed=42,
        on_step=lambda step: found.append(step.latents.copy()),
    )  # fmt: skip
    # diffusers' PLMS calls back once more, for the second evaluation of its first step.
    wanted = wanted[-STEPS:] if sampler != "PLMS" else wanted
    assert len(found) == len(wanted)
    errors = [relative_l2(a, b) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) <= 1e-4, errors
    difference = np.abs(result.images.astype(int) - pictures.astype(int))
    assert difference.max() <= 1


def test_negative_prompt_is_that_of_diffusers(ours: Pipeline, reference: Any) -> None:
    import torch

    _, pictures = diffusers_run(
        reference, "EulerDiscreteScheduler", {}, prompt="a circle on a white background", negative_prompt="red",
        num_inference_steps=8, guidance_scale=6.0, generator=torch.Generator("cpu").manual_seed(3),
    )  # fmt: skip
    result = ours(
        "a circle on a white background", negative_prompt="red", sampler="Euler", steps=8, guidance=6.0, seed=3
    )
    assert np.abs(result.images.astype(int) - pictures.astype(int)).max() <= 1
    without = ours("a circle on a white background", sampler="Euler", steps=8, guidance=6.0, seed=3)
    assert not np.array_equal(without.images, result.images)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler", "DPM++ 2M", "PLMS"])
def test_without_guidance(sampler: str, ours: Pipeline, reference: Any) -> None:
    """b rows a call; some runtimes overwrite the latents with the U-Net's output here."""
    import torch

    schedule, scheduler, options = SAMPLERS[sampler]
    _, pictures = diffusers_run(
        reference, scheduler, options, prompt=PROMPT, num_inference_steps=6, guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(1),
    )  # fmt: skip
    result = ours(PROMPT, sampler=sampler, schedule=schedule, steps=6, guidance=1.0, seed=1)
    assert np.abs(result.images.astype(int) - pictures.astype(int)).max() <= 1


def test_a_batch_is_its_pictures_one_by_one(ours: Pipeline) -> None:
    """Within a level: ONNX Runtime's kernels may sum in another order for another batch."""
    together = ours(PROMPT, sampler="Euler a", steps=5, seed=10, batch=3)
    assert together.seeds == (10, 11, 12)
    for index in range(3):
        alone = ours(PROMPT, sampler="Euler a", steps=5, seed=10 + index)
        assert np.abs(together.images[index].astype(int) - alone.images[0].astype(int)).max() <= 1


def test_other_sizes(ours: Pipeline) -> None:
    result = ours(PROMPT, sampler="Euler", steps=2, height=64, width=192)
    assert result.images.shape == (1, 64, 192, 3)
    assert result.images.dtype == np.uint8


def test_the_same_call_gives_the_same_bytes(ours: Pipeline) -> None:
    first, second = (ours(PROMPT, sampler="Euler a", steps=4, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)


def test_fp16_is_near_fp32(shapes_bundle: Path, ours: Pipeline) -> None:
    half = Pipeline.load(shapes_bundle, precision="fp16")
    a = ours(PROMPT, sampler="DPM++ 2M", schedule="karras", steps=STEPS, guidance=5.0, seed=42).images
    b = half(PROMPT, sampler="DPM++ 2M", schedule="karras", steps=STEPS, guidance=5.0, seed=42).images
    mse = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert not np.array_equal(a, b), "an fp16 run that is bit for bit fp32 did not run in fp16"
    assert 10 * np.log10(255**2 / mse) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 100}, "height: expected a positive multiple of 8, got 100"),
        ({"width": 0}, "width: expected a positive multiple"),
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"batch": 0}, "batch"),
        ({"sampler": "DPM+ 2M"}, "DPM\\+\\+ 2M"),
        ({"schedule": "karas"}, "karras"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_requests(ours: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ours(PROMPT, **{"steps": 2, **arguments})


def test_a_long_prompt_is_read_to_its_end(ours: Pipeline) -> None:
    long = "a circle on a white background" + ", plain" * 80
    first, second = (ours(long + end, sampler="Euler", steps=2, seed=4).latents for end in (", red", ", blue"))
    assert np.abs(first - second).max() > 1e-3


def test_parameters_are_written_as_web_uis_read_them(ours: Pipeline) -> None:
    result = ours(PROMPT, negative_prompt="red", sampler="DPM++ 2M", schedule="karras", steps=2, guidance=5.0, seed=9)
    lines = result.parameters[0].split("\n")
    assert lines[0] == PROMPT
    assert lines[1] == "Negative prompt: red"
    for part in ("Steps: 2", "Sampler: DPM++ 2M", "Schedule type: Karras", "CFG scale: 5", "Seed: 9", "Size: 128x128"):
        assert part in lines[2]


@pytest.mark.parametrize("name", ["unet/model.onnx", "tokenizer/merges.txt", "scheduler/scheduler_config.json"])
def test_a_changed_byte_is_refused_by_name(shapes_bundle: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(shapes_bundle, bundle)
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=Path(name).name):
        Pipeline.load(bundle)


def test_a_missing_precision_is_a_usage_error(shapes_bundle: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        Pipeline.load(shapes_bundle, precision="int8")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="latentrt export"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="latentrt export"):
        open_bundle(tmp_path)


def test_a_folder_without_manifest_runs(shapes_bundle: Path, tmp_path: Path, ours: Pipeline) -> None:
    """As optimum-cli writes it."""
    bundle = tmp_path / "b"
    shutil.copytree(shapes_bundle, bundle)
    (bundle / "manifest.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Pipeline.load(bundle)(PROMPT, sampler="Euler", steps=3)
    np.testing.assert_array_equal(result.images, ours(PROMPT, sampler="Euler", steps=3).images)


def test_pictures_differ_between_prompts(ours: Pipeline) -> None:
    """Against a runtime that ignores its conditioning."""
    a, b = (ours(p, sampler="Euler", steps=4).images for p in (PROMPT, "a large green star on a white background"))
    assert np.abs(a.astype(int) - b.astype(int)).mean() > 20


def test_png_round_trip(ours: Pipeline, tmp_path: Path) -> None:
    from latentrt.runtime.image import save_png

    result = ours(PROMPT, sampler="Euler", steps=1)
    save_png(tmp_path / "p.png", result.images[0], parameters=result.parameters[0])
    with Image.open(tmp_path / "p.png") as image:
        np.testing.assert_array_equal(np.asarray(image), result.images[0])
        assert image.info["parameters"] == result.parameters[0]
