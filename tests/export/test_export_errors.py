"""Bad input to `latentrt export`: one message that says what to do, an exit code, and the bundle as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import ldm_layout
import pytest
import torch
from families import Sources
from safetensors.torch import load_file, save_file

from latentrt.runtime.cli import main

Tensors = dict[str, torch.Tensor]
# A module of any Stable Diffusion 1, with factors for the width of the published ones.
QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
OTHER_LORA: Tensors = {f"{QUERY}.lora_down.weight": torch.ones(4, 1280), f"{QUERY}.lora_up.weight": torch.ones(1280, 4)}
WEIGHT, EXTRA = "model.diffusion_model.out.2.weight", "model.diffusion_model.out.2.scale"


@pytest.fixture(scope="module")
def folder(family_sources: Callable[[str], Sources], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of input, good and bad; a single file is read with the checkpoint's configs."""
    made = tmp_path_factory.mktemp("inputs")
    (made / "checkpoint").symlink_to(family_sources("sd15").path)
    file = ldm_layout.write_single_file(made / "checkpoint", made / "model.safetensors", "sd1")
    state = load_file(file)
    for name, tensors in {
        "missing": {name: tensor for name, tensor in state.items() if name != WEIGHT},
        "extra": {**state, EXTRA: torch.ones(1)},
        "nan": {**state, WEIGHT: torch.full_like(state[WEIGHT], torch.nan)},
        "lora": OTHER_LORA,
        "wide": {"emb_params": torch.ones(1, 768)},
        "word": {"emb_params": torch.ones(1, 32)},
    }.items():
        save_file(tensors, made / f"{name}.safetensors")
    (made / "short.safetensors").write_bytes(file.read_bytes()[:-100])
    torch.save({"state_dict": {WEIGHT: state[WEIGHT]}}, made / "model.ckpt")
    torch.save({"string_to_param": {"*": torch.ones(1, 32)}}, made / "word.pt")
    (made / "empty").mkdir()
    return made


@pytest.fixture
def run(
    folder: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that fails, in the folder of inputs, and returns its message."""
    monkeypatch.chdir(folder)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "b"))

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}

    def export(words: str, code: int) -> str:
        before = contents()
        assert main(["export", *words.split(), "-o", str(bundle)]) == code
        assert contents() == before
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".export-", ".b.unfinished"))]
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        notes, found, message = printed.err.partition("error: ")
        assert found
        assert all("taken for" in line for line in notes.splitlines())
        return message

    return export


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("nowhere", 1, "nowhere: expected a diffusers checkpoint, a folder with model_index.json, or a .safetensors"),
        ("empty", 1, "found no model_index.json in it"),
        ("checkpoint --precision int8", 2, "latentrt calibrate"),
        ("checkpoint --precision ,", 2, "expected one or more of fp32, fp16"),
        ("checkpoint --precision fp16,mixed", 2, "expected fp16 or mixed, got both"),
        ("checkpoint --opset 9", 2, "got 9"),
        ("checkpoint --target cpu,tpu", 2, "expected one or more of cpu, cuda, got 'tpu'"),
        ("checkpoint --check some", 2, "expected one of auto, full, quick, none, got 'some'"),
        ("checkpoint --config checkpoint", 2, "--config: expected a checkpoint in a single file with it"),
        ("checkpoint --prediction-type epsilon", 2, "--prediction-type: expected a checkpoint in a single file"),
        ("model.safetensors --config checkpoint --prediction-type v", 2, "epsilon, v_prediction, got 'v'"),
        ("model.safetensors --config empty", 1, "empty: expected a diffusers folder with configs, found none in it"),
        ("model.safetensors", 1, "Give a folder with its tokenizer: --config"),
        (
            "missing.safetensors --config checkpoint",
            1,
            f"Stable Diffusion 1, which it was taken for, got 1 missing: '{WEIGHT}'",
        ),
        ("extra.safetensors --config checkpoint", 1, f"got 1 unexpected: '{EXTRA}'"),
        ("short.safetensors --config checkpoint", 1, "The file is truncated or damaged: copy it again."),
        ("nan.safetensors --config checkpoint", 1, f"'{WEIGHT}': expected finite values, got"),
        ("model.ckpt", 1, "got a pickle, which may run code when it is loaded and is not read. Convert it"),
        ("lora.safetensors", 1, "got a LoRA. Add it to a checkpoint: --lora"),
        ("checkpoint --lora none.safetensors", 1, "none.safetensors: expected a safetensors file, got No such file"),
        ("checkpoint --lora lora.safetensors", 1, "lora.safetensors: expected changes of weights that this checkpoint"),
        ("checkpoint --lora lora.safetensors=much", 2, "--lora: expected FILE or FILE=SCALE, got 'lora.safetensors="),
        ("checkpoint --lora lora.safetensors=nan", 2, "expected a finite scale, got nan"),
        ("checkpoint --lora model.safetensors", 1, "expected the keys of a LoRA, LoHa, LoKr or DoRA"),
        ("checkpoint --lora model.ckpt", 1, "got a pickle"),
        ("checkpoint --embedding word.pt", 2, "expected .safetensors, got a pickle"),
        ("checkpoint --embedding none.safetensors", 1, "expected a textual inversion, got No such file"),
        ("checkpoint --embedding wide.safetensors", 2, "this one is for Stable Diffusion 1.x"),
        ("checkpoint --embedding word.safetensors=red</w>", 2, "expected a name that is no token yet"),
        (
            "checkpoint --vae nowhere",
            1,
            "nowhere: expected the folder of an AutoencoderKL, with config.json, found none",
        ),
        ("checkpoint --vae checkpoint/unet", 1, "expected AutoencoderKL, got UNet2DConditionModel"),
        ("checkpoint --vae lora.safetensors", 1, "lora.safetensors: expected"),
        ("checkpoint --controlnet lora.safetensors", 1, "expected a ControlNet"),
    ],
)
def test_bad_input(words: str, code: int, said: str, run: Callable[..., str]) -> None:
    assert said in run(words, code)


def test_too_little_disk_is_said_before_anything_is_made(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "GB of free disk, got 0.0 GB. Free some, choose another place with -o" in run("checkpoint", 2)


def test_a_hub_that_is_not_reached(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be a repository and a folder is spoken of as both."""

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=fail))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    said = run("models/sd15", 1)
    assert "models/sd15: expected to reach the Hugging Face hub, or to find the checkpoint in its cache" in said
    assert "no route" in said


def test_a_bundle_is_not_made_for_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert main(["export", "nan.safetensors", "--config", "checkpoint", "-o", str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_output_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "checkpoint"]) == 2
    assert "output" in capsys.readouterr().err
