"""`latentrt generate` on every family, and a fresh process for every task that must not load PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_oracle import PROMPT, image_of, rectangle, square, stripes
from PIL import Image

from latentrt.runtime import Control, Pipeline, base_and_refiner
from latentrt.runtime.cli import main

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with image.png, mask.png and lines.png."""
    folder = tmp_path_factory.mktemp("pictures")
    image_of(square()).save(folder / "image.png")
    image_of(rectangle()).save(folder / "mask.png")
    image_of(stripes()).save(folder / "lines.png")
    return folder


# Options after the prompt, with the folder of the pictures as {0}; and the same settings in Python.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("--negative coin", {"negative_prompt": "coin"}),
    "sd21": ("--guidance-rescale 0.7 --sampler ddim", {"guidance_rescale": 0.7, "sampler": "ddim"}),
    "sd15_inpaint": (
        "--image {0}/image.png --mask {0}/mask.png --strength 0.8",
        {"image": square(), "mask": rectangle(), "strength": 0.8},
    ),
    "instruct_pix2pix": (
        "--image {0}/image.png --image-guidance 1.2 --guidance 5",
        {"image": square(), "image_guidance": 1.2, "guidance": 5.0},
    ),
    "lcm": ("--guidance 8 --image {0}/image.png", {"guidance": 8.0, "image": square()}),
    "sd15_control": (
        "--control {0}/lines.png@0.8@0-0.5 --control {0}/lines.png@0.5@0.2-1@1 --preview {0}/preview.png",
        {
            "controls": [
                Control(image=stripes(), scale=0.8, end=0.5),
                Control(image=stripes(), scale=0.5, start=0.2, model=1),
            ]
        },
    ),
    "sdxl_base": (
        "--prompt-2 ice --original-size 80x96 --crop 8x4 --clip-skip 1",
        {"prompt_2": "ice", "original_size": (96, 80), "crop": (4, 8), "clip_skip": 1},
    ),
    "sdxl_turbo": ("--guidance 0 --batch 2", {"guidance": 0.0, "batch": 2}),
    "sdxl_refiner": ("--image {0}/image.png --strength 0.5", {"image": square(), "strength": 0.5}),
    "sdxl_control": ("--control {0}/lines.png", {"controls": [Control(image=stripes())]}),
    "sdxl_inpaint": ("--image {0}/image.png --mask {0}/mask.png", {"image": square(), "mask": rectangle()}),
}


@pytest.mark.parametrize("family", COMMANDS)
def test_generate(
    family: str, family_bundle: Bundles, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files hold what the same settings draw in Python."""
    options, settings = COMMANDS[family]
    arguments = [part.format(pictures) for part in options.split()]
    bundle, out = family_bundle(family), tmp_path / "out.png"
    common = ["--steps", "4", "--seed", "3", "--json", "-o", str(out)]
    assert main(["generate", str(bundle), PROMPT, *arguments, *common]) == 0
    report = json.loads(capsys.readouterr().out)
    wanted = Pipeline.load(bundle)(PROMPT, steps=4, seed=3, **settings).images
    found = np.stack([np.asarray(Image.open(picture["path"])) for picture in report["pictures"]])
    np.testing.assert_array_equal(found, wanted)
    if "--preview" in arguments:
        assert np.asarray(Image.open(pictures / "preview.png")).shape == (64, 64, 3)


def test_generate_with_a_refiner(family_bundle: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, refiner, out = family_bundle("sdxl_base"), family_bundle("sdxl_refiner"), tmp_path / "out.png"
    options = ["--refiner", str(refiner), "--refiner-switch", "0.5", "--steps", "4", "--seed", "3"]
    assert main(["generate", str(base), PROMPT, *options, "-o", str(out), "--json"]) == 0
    capsys.readouterr()
    wanted = base_and_refiner(Pipeline.load(base), Pipeline.load(refiner), PROMPT, switch=0.5, steps=4, seed=3)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), wanted.images[0])


def test_one_message_for_what_a_bundle_lacks(
    family_bundle: Bundles, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = family_bundle("sd15"), tmp_path / "out.png"
    options = ["--control", f"{pictures}/lines.png", "-o", str(out)]
    assert main(["generate", str(bundle), PROMPT, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "expected controlnet, found" in captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()


# What a fresh process runs, with the bundles and the folder of the pictures in sys.argv.
TASKS: dict[str, tuple[str, str]] = {
    "text to image": ("sd15", "pipe(prompt, negative_prompt='coin', steps=2, sampler='DPM++ 2M Karras')"),
    "image to image": ("sd15", "pipe(prompt, image=folder + '/image.png', strength=0.5, steps=4)"),
    "inpainting": ("sd15", "pipe(prompt, image=folder + '/image.png', mask=folder + '/mask.png', steps=2)"),
    "inpainting model": (
        "sd15_inpaint",
        "pipe(prompt, image=folder + '/image.png', mask=folder + '/mask.png', steps=2)",
    ),
    "editing": ("instruct_pix2pix", "pipe(prompt, image=folder + '/image.png', steps=2)"),
    "ControlNet": ("sd15_control", "pipe(prompt, controls=[Control(image=folder + '/lines.png')], steps=2)"),
    "SDXL": ("sdxl_base", "pipe(prompt, prompt_2='ice', steps=2)"),
    "refiner": (
        "sdxl_base",
        "base_and_refiner(pipe, Pipeline.load(sys.argv[2]), prompt, switch=0.5, steps=4)",
    ),
    "LCM": ("lcm", "pipe(prompt, steps=2)"),
    "SDE and hi-res fix": ("sd15", "pipe(prompt, sampler='DPM++ SDE', hires=Hires(scale=1.5), steps=2)"),
    "preview": ("sd15_control", "[step.preview() for step in pipe.stream(prompt, steps=2)] and pipe(prompt, steps=1)"),
}
SCRIPT = """
import sys
from latentrt.runtime import Control, Hires, Pipeline, base_and_refiner
prompt, folder = "a (red:1.2) [cube|coin] BREAK ice", sys.argv[3]
pipe = Pipeline.load(sys.argv[1])
result = {call}
assert result.images.std() > 0
held = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(held & {{"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "scipy"}}))
"""


@pytest.mark.parametrize("task", TASKS)
def test_no_task_loads_pytorch(task: str, family_bundle: Bundles, pictures: Path) -> None:
    family, call = TASKS[task]
    paths = [family_bundle(family), family_bundle("sdxl_refiner") if task == "refiner" else "", pictures]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(call=call), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stdout
