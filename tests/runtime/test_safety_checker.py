"""The safety checker in the runtime: what it sees, what it flags, and what a call shows, against diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from family_oracle import PROMPT
from numpy.typing import NDArray
from task_oracle import check_pictures_near, diffusers_pipeline, generators, watched

from latentrt.runtime import ConfigError, Pipeline, Request, UsageError
from latentrt.runtime.cli import main
from latentrt.runtime.pixels import load_image
from latentrt.runtime.request import from_record, to_record
from latentrt.runtime.safety_checker import ClipProcessor, flagged

if TYPE_CHECKING:
    from families import Sources

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
COLOURS = {"image_mean": MEAN, "image_std": STD}
PLAIN: dict[str, Any] = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, **COLOURS}
OLD: dict[str, Any] = {"size": 224, "crop_size": 224, **COLOURS, "feature_extractor_type": "CLIPFeatureExtractor"}
OTHER: dict[str, Any] = {
    "size": {"shortest_edge": 97}, "crop_size": {"height": 64, "width": 97}, "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7], "resample": 2, "rescale_factor": 1 / 127.5,
}  # fmt: skip


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", [(512, 512), (512, 768), (333, 224), (64, 97), (224, 1000)])
@pytest.mark.parametrize("config", [PLAIN, OLD, OTHER], ids=["plain", "old", "other"])
def test_the_preprocessing_is_that_of_transformers(config: dict[str, Any], size: tuple[int, int]) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    pictures = noise(2, *size, 3)
    theirs = CLIPImageProcessorPil(**{name: value for name, value in config.items() if "type" not in name})
    wanted = theirs([Image.fromarray(picture) for picture in pictures], return_tensors="np").pixel_values
    found = ClipProcessor.from_config(config)(pictures)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack(list(wanted)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"do_center_crop": False}, "expected do_center_crop true, got False"),
        ({"size": {"height": 224, "width": 224}}, "expected a shortest edge"),
        ({"crop_size": 225}, "a crop that fits into it.*crop_size 225"),
        ({"image_std": [1, 0, 1]}, r"image_std \[1, 0, 1\]"),
        ({"image_mean": None}, "image_mean None"),
        ({"resample": 9}, "resample 9"),
    ],
)
def test_other_preprocessing_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ClipProcessor.from_config({**PLAIN, **change})


def test_the_verdict_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On scores around 0 in steps finer than the rounding, with and without special care."""
    import torch
    from diffusers.pipelines.stable_diffusion import safety_checker as module
    from families import make_safety_checker

    generator = np.random.default_rng(0)
    thresholds = generator.uniform(0.1, 0.3, 20).astype(np.float32)
    checker = make_safety_checker(seed=0)
    with torch.no_grad():
        checker.special_care_embeds_weights.copy_(torch.from_numpy(thresholds[:3]))
        checker.concept_embeds_weights.copy_(torch.from_numpy(thresholds[3:]))
    # One special and one other score of each row lie where rounding or special care decides.
    rows, fine = np.arange(600), generator.integers(-8, 9, (2, 600)) / 8000
    above = np.full((600, 20), -0.05)
    above[rows, rows % 3] = 0.0005 + fine[0]
    above[rows, 3 + rows % 17] = generator.choice([0.0005, -0.0095], 600) + fine[1]
    cosines = (thresholds + above).astype(np.float32)
    parts = {3: torch.from_numpy(cosines[:, :3].copy()), 17: torch.from_numpy(cosines[:, 3:].copy())}
    monkeypatch.setattr(module, "cosine_distance", lambda _, concepts: parts[len(concepts)])
    images, wanted = checker(clip_input=torch.zeros(600, 3, 224, 224), images=np.ones((600, 2, 2, 3)))
    scores = cosines - thresholds
    found = flagged({"special_scores": scores[:, :3], "concept_scores": scores[:, 3:]})
    assert found.tolist() == wanted == (images == 0).all(axis=(1, 2, 3)).tolist()
    assert 50 < sum(wanted) < 550


@pytest.fixture(scope="module")
def ours(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sd15_checked"))


@pytest.fixture(scope="module")
def theirs(family_sources: Callable[[str], Sources]) -> Any:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    folder = family_sources("sd15_checked").path
    return diffusers_pipeline(
        folder,
        safety_checker=StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker"),
        feature_extractor=CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"),
    )


COUNT = 8
SETTINGS: dict[str, Any] = {"batch": COUNT, "steps": 2, "guidance": 3.0, "seed": 0, "height": 64, "width": 96}


def test_flagged_pictures_come_out_black_as_in_diffusers(ours: Pipeline, theirs: Any) -> None:
    wanted = theirs(
        PROMPT, num_images_per_prompt=COUNT, num_inference_steps=2, guidance_scale=3.0, height=64, width=96,
        generator=generators(list(range(COUNT))), output_type="np",
    )  # fmt: skip
    found = ours(PROMPT, **SETTINGS)
    assert found.nsfw_content_detected == tuple(wanted.nsfw_content_detected)
    assert 0 < sum(wanted.nsfw_content_detected) < COUNT
    check_pictures_near(found.images, (wanted.images * 255).round().astype(np.uint8))
    black = (found.images == 0).all(axis=(1, 2, 3))
    assert tuple(black.tolist()) == found.nsfw_content_detected


def test_without_it_nothing_is_looked_at(ours: Pipeline) -> None:
    checked = ours(PROMPT, **SETTINGS)
    with watched(ours, "safety_checker") as session:
        plain = ours(PROMPT, safety_checker=False, **SETTINGS)
        latents = ours(PROMPT, decode=False, **SETTINGS)
    assert session.feeds == []
    assert plain.nsfw_content_detected is latents.nsfw_content_detected is None
    assert plain.images.any(axis=(1, 2, 3)).all()
    passed = ~np.asarray(checked.nsfw_content_detected)
    np.testing.assert_array_equal(plain.images[passed], checked.images[passed])


def test_a_bundle_without_one_says_so_before_it_draws(family_bundle: Callable[[str], Path]) -> None:
    pipe = Pipeline.load(family_bundle("sd15"))
    assert pipe(PROMPT, steps=1).nsfw_content_detected is None
    steps: list[Any] = []
    with pytest.raises(UsageError, match=r"expected safety_checker, found .*or draw without it"):
        pipe(PROMPT, steps=1, safety_checker=True, on_step=steps.append)
    assert steps == []


def test_a_record_keeps_the_choice() -> None:
    assert "safety_checker" not in to_record(Request(prompt=PROMPT))
    assert from_record(to_record(Request(prompt=PROMPT, safety_checker=False))).safety_checker is False


def test_the_command_tells_what_was_flagged(
    family_bundle: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(family_bundle("sd15_checked")), PROMPT, "-o", str(tmp_path / "out.png")]
    words += ["--batch", str(COUNT), "--steps", "2", "--guidance", "3", "--height", "64", "--width", "96"]
    assert main([*words, "--json"]) == 0
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    flags = [picture["nsfw_content_detected"] for picture in pictures]
    assert 0 < sum(flags) < COUNT
    for picture in pictures:
        assert load_image(picture["path"]).any() != picture["nsfw_content_detected"]
    assert main(words) == 0
    said = capsys.readouterr().err
    named = [picture["path"] for picture in pictures if picture["nsfw_content_detected"]]
    assert f"safety checker flagged them: {', '.join(named)}." in said
    assert main([*words, "--no-safety-checker", "--json"]) == 0
    assert all("nsfw_content_detected" not in line for line in json.loads(capsys.readouterr().out)["pictures"])
