"""Single files from the command to the picture: beside folders, and diffusers' pipelines, of the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import ldm_layout
import pytest
from families import Sources, make_text_encoder, make_unet, make_vae
from family_oracle import OTHER, PROMPT, image_of, rectangle, square
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours
from transformers import CLIPTokenizer

from latentrt.export.clip_tokenizer import END, tokenizer_files
from latentrt.export.networks import libraries_quiet
from latentrt.export.published_configs import published_configs
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.manifest import MANIFEST, load_manifest

OPTIONS = ["--precision", "fp32", "--check", "quick", "--json"]


@dataclass(frozen=True)
class Case:
    """How a family of `families` is drawn with.

    Attributes:
        layout: key of `ldm_layout.NARROW`.
        title: what the command takes the file for.
        ours: settings of the runtime.
        theirs: arguments of diffusers.
    """

    layout: str
    title: str
    pipeline: str = "StableDiffusionPipeline"
    ours: dict[str, Any] = field(default_factory=lambda: {"height": 64, "width": 96})
    theirs: dict[str, Any] = field(default_factory=lambda: {"height": 64, "width": 96})


CASES = {
    "sd15": Case("sd1", "Stable Diffusion 1"),
    "sd21": Case("sd2", "Stable Diffusion 2"),
    "sdxl_base": Case("sdxl", "SDXL", "StableDiffusionXLPipeline"),
    "sdxl_refiner": Case(
        "refiner",
        "SDXL refiner",
        "StableDiffusionXLImg2ImgPipeline",
        {"image": square(64, 96), "strength": 0.8},
        {"image": image_of(square(64, 96)), "strength": 0.8},
    ),
    "sd15_inpaint": Case(
        "sd1",
        "Stable Diffusion 1 inpainting",
        "StableDiffusionInpaintPipeline",
        {"image": square(64, 96), "mask": rectangle(64, 96), "strength": 1.0},
        {
            "image": image_of(square(64, 96)),
            "mask_image": image_of(rectangle(64, 96)),
            "height": 64,
            "width": 96,
            "strength": 1.0,
        },
    ),
}


def check_pictures(bundle: Path, pipeline: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The latents of every step, and the picture, are diffusers'."""
    wanted = record_diffusers(
        pipeline, prompt=PROMPT, negative_prompt=OTHER, num_inference_steps=4, guidance_scale=5.0, seed=3, **theirs
    )
    found = record_ours(Pipeline.load(bundle), PROMPT, negative_prompt=OTHER, steps=4, guidance=5.0, seed=3, **ours)
    compare(found, wanted)


def contents(bundle: Path) -> dict[str, bytes]:
    """All that a bundle consists of; the manifest says where it came from."""
    files = [file for file in bundle.rglob("*") if file.is_file() and file.name not in (MANIFEST, ".lock")]
    return {file.relative_to(bundle).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", CASES)
def test_a_single_file_gives_the_bundle_of_its_folder(
    name: str,
    family_sources: Callable[[str], Sources],
    family_bundle: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Byte for byte, with the folder's configs and none of its weights; and the pictures are diffusers'."""
    case, folder = CASES[name], family_sources(name).path
    file = ldm_layout.write_single_file(folder, tmp_path / "some model.safetensors", case.layout)
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    bundle = tmp_path / "b"
    assert main(["export", str(file), "-o", str(bundle), "--config", str(configs), *OPTIONS]) == 0
    printed = capsys.readouterr()
    assert f"some model: taken for {case.title}\n" in printed.err
    assert json.loads(printed.out)["notes"][0] == f"taken for {case.title}"
    assert load_manifest(bundle).name == "some model"
    found, wanted = contents(bundle), contents(family_bundle(name))
    assert found.keys() == wanted.keys()
    assert [file for file in found if found[file] != wanted[file]] == []
    check_pictures(bundle, diffusers_pipeline(folder, case.pipeline), case.ours, case.theirs)


# Published configs of which the weights show all that is changed here: widths, levels and layers.
NARROW_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 3}
NARROW_UNET = {
    "block_out_channels": [64, 128],
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
NARROW_VAE = {"block_out_channels": [32, 32, 32, 64], "layers_per_block": 1}
NARROW: dict[str, dict[str, Any]] = {"unet": NARROW_UNET, "text_encoder": NARROW_TEXT, "vae": NARROW_VAE}


def narrow_configs() -> dict[str, dict[str, Any]]:
    """Stable Diffusion 1's configs by component, as its weights will show them."""
    published = {part: dict(config) for part, config in published_configs("sd1").items()}
    for part, narrow in NARROW.items():
        published[part] |= narrow
    for part in ("unet", "vae"):
        del published[part]["_class_name"]
    return published


def narrow_pipeline(tokenizer: Path) -> Any:
    """A diffusers pipeline with Stable Diffusion 1's published schedule and tokenizer, and narrow networks.

    Args:
        tokenizer: folder to write it to.
    """
    configs = narrow_configs()
    for name, content in tokenizer_files(END).items():
        (tokenizer / name).write_bytes(content)
    with libraries_quiet():
        pipeline = diffusers.StableDiffusionPipeline(
            unet=make_unet(configs["unet"], seed=1),
            vae=make_vae(configs["vae"], seed=1),
            text_encoder=make_text_encoder(configs["text_encoder"], seed=1),
            tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
            scheduler=getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_single_file_alone_draws_as_diffusers_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With configs that its weights and its family tell, and the tokenizer that ships with this package."""
    pipeline = narrow_pipeline(tmp_path)
    states = {part: ldm_layout.state_of(part, getattr(pipeline, part)) for part in ("unet", "vae", "text_encoder")}
    state = ldm_layout.single_file_state("sd1", states, narrow_configs())
    file = ldm_layout.write_file(tmp_path / "model.safetensors", state)
    bundle = tmp_path / "b"
    assert main(["export", str(file), "-o", str(bundle), *OPTIONS]) == 0
    assert len(json.loads(capsys.readouterr().out)["artifacts"]) == 4
    check_pictures(bundle, pipeline, CASES["sd15"].ours, CASES["sd15"].theirs)
