"""Every command of the README is run as it stands, on the bundle that its own first command makes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands(program: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(program)]


def write_lora(checkpoint: Path, file: Path) -> None:
    """A LoRA of rank 2 for the attention of a checkpoint's U-Net, as diffusers saves it, with random factors."""
    rng = np.random.default_rng(0)
    factors: dict[str, Any] = {}
    for name, weight in load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors").items():
        if ".to_q." in name:
            module, (out, features) = name.removesuffix(".weight"), weight.shape
            factors[f"unet.{module}.lora_A.weight"] = rng.standard_normal((2, features), np.float32)
            factors[f"unet.{module}.lora_B.weight"] = rng.standard_normal((out, 2), np.float32) / 10
    assert factors
    save_file(factors, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a newcomer has it: the examples, and a LoRA of their own."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    write_lora(folder / "examples" / "shapes", folder / "style.safetensors")
    return folder


@pytest.mark.slow
def test_every_latentrt_command_runs(folder: Path) -> None:
    """In the README's order, because each stands on the one before."""
    found = commands("latentrt ")
    assert len(found) >= 6
    for command in found:
        words = shlex.split(command)
        done = subprocess.run(
            [sys.executable, "-m", "latentrt.runtime.cli", *words[1:]], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (folder / "out.png").stat().st_size > 0


@pytest.mark.slow
def test_every_python_block_runs(folder: Path) -> None:
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = {word for line in commands("make ") for word in line.split()[1:]}
    wanted |= set(re.findall(r"`make (\w+)`", README))
    assert wanted
    for target in wanted:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_extras_exist() -> None:
    import tomllib

    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {name for group in re.findall(r"latentrt\[([\w,-]+)\]", README) for name in group.split(",")}
    assert named <= extras


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
