"""LoRAs, textual inversions and VAEs given to the command: pictures of the bundle against diffusers' pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SD_VAE, Sources, make_vae
from family_oracle import OTHER, PROMPT, SIZE
from ldm_layout import state_of, to_ldm, write_file
from lora_files import LoraFactors, kohya, random_lora, write
from safetensors.torch import save_file
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours

from latentrt.export.networks import libraries_quiet
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.manifest import load_manifest, sha256_of

LATENTS = ("unet", "text_encoder")
VAE = ("vae_decoder", "vae_encoder")


@pytest.fixture
def checkpoint(family_sources: Callable[[str], Sources]) -> Path:
    return family_sources("sd15").path


@pytest.fixture
def pipeline(checkpoint: Path) -> Any:
    """diffusers' own, fresh, for a test to change."""
    return diffusers_pipeline(checkpoint)


@pytest.fixture
def export(
    checkpoint: Path,
    family_bundle: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict[str, str]]:
    """Exports the checkpoint with more options into a bundle that holds it as it is; why, by component."""
    shutil.copytree(family_bundle("sd15"), tmp_path / "b")

    def run(*words: object) -> dict[str, str]:
        options = ["-o", str(tmp_path / "b"), "--precision", "fp32", "--check", "quick", "--json"]
        assert main(["export", str(checkpoint), *options, *map(str, words)]) == 0
        lines = json.loads(capsys.readouterr().out)["artifacts"]
        return {line["component"]: line["reason"] or line["status"] for line in lines}

    return run


def changes(bundle: Path) -> Any:
    return load_manifest(bundle).source["changes"]


def check_pictures(bundle: Path, pipeline: Any, prompt: str = PROMPT) -> None:
    """The latents of every step, and the picture, are diffusers'."""
    wanted = record_diffusers(
        pipeline, prompt=prompt, negative_prompt=OTHER, num_inference_steps=4, guidance_scale=5.0, seed=3, **SIZE
    )
    ours = Pipeline.load(bundle)
    compare(record_ours(ours, prompt, negative_prompt=OTHER, steps=4, guidance=5.0, seed=3), wanted)


def fuse(pipeline: Any, file: Path, scale: float) -> None:
    with libraries_quiet():
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()


def lora_file(path: Path, factors: LoraFactors) -> Path:
    return write(path, kohya(factors))


def test_a_lora(export: Callable[..., dict[str, str]], pipeline: Any, tmp_path: Path) -> None:
    """Of the U-Net alone: nothing else is exported again, for another scale the U-Net is, and without it too."""
    file = lora_file(tmp_path / "style=1.safetensors", random_lora(pipeline, seed=1, components=["unet"]))
    kept = {"text_encoder": "up to date", "vae_decoder": "up to date", "vae_encoder": "up to date"}
    again = {**kept, "unet": "changed: source.unet/changes"}
    for words, scale in ((f"{file}=0.5", 0.5), (file, 1.0)):
        assert export("--lora", words) == again
        (noted,) = changes(tmp_path / "b")["unet"]
        modules = noted.pop("modules")
        assert noted == {"kind": "lora", "file": file.name, "sha256": sha256_of(file), "scale": scale}
        assert modules > 10
        assert export("--lora", words) == {**kept, "unet": "up to date"}
    fuse(pipeline, file, 1.0)
    check_pictures(tmp_path / "b", pipeline)
    assert export() == again
    assert "changes" not in load_manifest(tmp_path / "b").source


def test_two_loras_and_words(export: Callable[..., dict[str, str]], pipeline: Any, tmp_path: Path) -> None:
    """All at once: LoRAs of U-Net and text encoder, and two textual inversions, one by the word in its file."""
    files = [
        lora_file(tmp_path / f"{seed}.safetensors", random_lora(pipeline, seed=seed, alpha=1.5)) for seed in (1, 2)
    ]
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32))
    save_file({"<dog>": vectors[:1].clone()}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors[1:].clone()}, tmp_path / "easy.safetensors")
    reasons = export(
        "--lora", f"{files[0]}=0.7", "--lora", files[1], "--embedding", tmp_path / "learned_embeds.safetensors",
        "--embedding", f"{tmp_path / 'easy.safetensors'}=<cat>",
    )  # fmt: skip
    assert reasons == {
        "text_encoder": "changed: source.text_encoder/changes",
        "unet": "changed: source.unet/changes",
        "vae_decoder": "up to date",
        "vae_encoder": "up to date",
    }
    found = changes(tmp_path / "b")
    assert [(note["kind"], note["scale"]) for note in found["unet"]] == [("lora", 0.7), ("lora", 1.0)]
    assert [note.get("token", note["kind"]) for note in found["text_encoder"]] == ["lora", "lora", "<dog>", "<cat>"]
    for file, scale in zip(files, (0.7, 1.0), strict=True):
        fuse(pipeline, file, scale)
    with libraries_quiet():
        pipeline.load_textual_inversion({"<dog>": vectors[:1]})
        pipeline.load_textual_inversion({"<cat>": vectors[1:]})
    check_pictures(tmp_path / "b", pipeline, "a red <cat> on <dog>, blue")


@pytest.mark.parametrize("layout", ["folder", "file", "original"])
def test_another_vae(
    layout: str, export: Callable[..., dict[str, str]], pipeline: Any, tmp_path: Path, checkpoint: Path
) -> None:
    """From a folder, from a file with diffusers' names, and from one with the original names."""
    pipeline.vae = make_vae(SD_VAE, seed=7)
    with libraries_quiet():
        pipeline.vae.save_pretrained(tmp_path / "other")
    state = state_of("vae", pipeline.vae)
    given = {
        "folder": lambda: tmp_path / "other",
        "file": lambda: tmp_path / "other" / "diffusion_pytorch_model.safetensors",
        "original": lambda: write_file(tmp_path / "mse.safetensors", to_ldm("vae", state, pipeline.vae.config)),
    }[layout]()
    reasons = export("--vae", given)
    assert {name: reason for name, reason in reasons.items() if name not in VAE} == dict.fromkeys(LATENTS, "up to date")
    assert all(reasons[name].startswith("changed: source.vae/") for name in VAE)
    assert changes(tmp_path / "b") == {"vae": [{"kind": "vae", "file": given.name}]}
    check_pictures(tmp_path / "b", pipeline)
