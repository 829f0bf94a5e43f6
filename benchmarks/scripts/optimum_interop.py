r"""Interoperation with optimum, both ways, in one run: its pipelines on our bundles, our runtime on its folders.

Tiny random checkpoints are exported by `latentrt export` and by `optimum-cli export onnx`. Every case is drawn from
the same seed by diffusers on the PyTorch weights, and by optimum and latentrt on both exports. The table shows how far
each is from diffusers: final latents, in their standard deviation, and pictures in levels of 0 to 255.

    python benchmarks/scripts/optimum_interop.py --venv build/optimum-venv \
        --json benchmarks/results/optimum-interop.json

With --fixtures it writes what `make test` compares with instead, where optimum is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import zipfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from optimum_env import (
    HERE,
    ensure_venv,
    export_with_latentrt,
    export_with_optimum,
    run,
    use_older_names,
    versions_in,
)
from PIL import Image

from latentrt.runtime import Pipeline

PROMPT, NEGATIVE = "a red cube on ice", "blue coin"
SIZE, STEPS, SEED = 64, 6, 7
# fp32 sums in another order; a value beside one half rounds to either side.
LATENTS_BOUND, LEVELS_BOUND = 1e-4, 1


@dataclass(frozen=True)
class Case:
    """One picture, in the words of diffusers and of latentrt.

    Attributes:
        scheduler: diffusers' class; None for the checkpoint's own.
        options: of the scheduler; with `schedule` what latentrt calls them.
        guidance: scale; 1 is off.
        pipeline: diffusers' class, if not the checkpoint's own: image to image.
        io_binding: of optimum, which has it on with CUDA and off otherwise.
    """

    family: str
    name: str
    scheduler: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None
    guidance: float = 7.5
    pipeline: str | None = None
    io_binding: bool = False

    @property
    def key(self) -> str:
        """The name of its results."""
        return f"{self.family}: {self.name}"


def cases() -> list[Case]:
    """Those of every run."""
    found = []
    for family in ("sd15", "sdxl_base"):
        img2img = "StableDiffusionXLImg2ImgPipeline" if family == "sdxl_base" else "StableDiffusionImg2ImgPipeline"
        found += [
            Case(family, "own scheduler"),
            Case(family, "DDIM", "DDIMScheduler"),
            Case(family, "Euler", "EulerDiscreteScheduler"),
            Case(family, "Euler a", "EulerAncestralDiscreteScheduler"),
            Case(family, "DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "karras"),
            Case(family, "UniPC", "UniPCMultistepScheduler"),
            Case(family, "DDIM without guidance", "DDIMScheduler", guidance=1.0),
            Case(family, "DDIM with IO binding", "DDIMScheduler", io_binding=True),
            Case(family, "Euler without guidance, IO binding", "EulerDiscreteScheduler", guidance=1.0, io_binding=True),
            Case(family, "image to image", "DDIMScheduler", pipeline=img2img),
        ]
    return [*found, Case("lcm", "own scheduler"), Case("lcm", "IO binding", io_binding=True)]


# optimum binds the U-Net's output over its input. With nothing in between (no guidance, a scheduler that does not scale
# its input), the latents are overwritten before the scheduler reads them. It does so with its own exports, too.
OVERWRITTEN = [
    Case(family, "DDIM without guidance, IO binding", "DDIMScheduler", guidance=1.0, io_binding=True)
    for family in ("sd15", "sdxl_base")
]


def drawing(case: Case, library: str, folder: Path, image: Path) -> dict[str, Any]:
    """What `optimum_draw.py` is told."""
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": case.guidance}
    if case.family != "lcm":
        call["negative_prompt"] = NEGATIVE
    call |= {"image": str(image), "strength": 0.6} if case.pipeline else {"height": SIZE, "width": SIZE}
    return {
        "library": library,
        "folder": str(folder),
        "pipeline": case.pipeline,
        "scheduler": case.scheduler,
        "scheduler_options": case.options,
        "io_binding": case.io_binding,
        "seed": SEED,
        "call": call,
    }


def settings_of(case: Case) -> dict[str, Any]:
    """A case of text to image in latentrt's words."""
    settings: dict[str, Any] = {"prompt": PROMPT, "steps": STEPS, "guidance": case.guidance, "seed": SEED}
    settings |= {name: value for name, value in (("sampler", case.scheduler), ("schedule", case.schedule)) if value}
    return settings if case.family == "lcm" else {**settings, "negative_prompt": NEGATIVE}


def draw_here(case: Case, folder: Path, image: Path) -> dict[str, Any]:
    """Latents and picture of latentrt, in the form of the others."""
    where = {"image": image, "strength": 0.6} if case.pipeline else {"height": SIZE, "width": SIZE}
    result = Pipeline.load(folder)(**settings_of(case), **where)
    return {"latents": result.latents, "picture": result.images[0] / np.float32(255)}


def difference(drawn: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest difference of latents, over the reference's standard deviation, and of pictures in levels."""
    levels = [np.rint(one["picture"] * 255).astype(int) for one in (drawn, reference)]
    return {
        "latents": float(np.abs(drawn["latents"] - reference["latents"]).max() / reference["latents"].std()),
        "levels": int(np.abs(levels[0] - levels[1]).max()),
    }


def compare(python: Path, work: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Case -> "program on whose export" -> its differences from diffusers."""
    from families import FAMILIES

    everything = [*cases(), *OVERWRITTEN]
    image = work / "start.png"
    ramp = np.arange(SIZE, dtype=np.uint8)
    Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None] * 3, ramp[None] * 3, np.uint8(90)), -1)).save(image)
    folders: dict[str, dict[str, Path]] = {}
    for family in dict.fromkeys(case.family for case in everything):
        checkpoint = use_older_names(FAMILIES[family](work / family / "checkpoint"))
        folders[family] = {name: work / family / name for name in ("checkpoint", "bundle", "optimum")}
        export_with_latentrt(checkpoint, folders[family]["bundle"])
        export_with_optimum(python, checkpoint, folders[family]["optimum"])
    drawings = {}
    for case in everything:
        drawings[f"{case.key}/diffusers"] = drawing(case, "diffusers", folders[case.family]["checkpoint"], image)
        for export in ("bundle", "optimum"):
            drawings[f"{case.key}/optimum on {export}"] = drawing(case, "optimum", folders[case.family][export], image)
    (work / "drawings.json").write_text(json.dumps(drawings))
    run([python, HERE / "optimum_draw.py", work / "drawings.json", work / "drawn.npz"])
    drawn = np.load(work / "drawn.npz")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for case in everything:
        results = {
            name.split("/")[1]: {part: drawn[f"{name}/{part}"] for part in ("latents", "picture")}
            for name in drawings
            if name.startswith(f"{case.key}/")
        }
        for export in ("bundle", "optimum"):
            results[f"latentrt on {export}"] = draw_here(case, folders[case.family][export], image)
        reference = results.pop("diffusers")
        figures[case.key] = {name: difference(result, reference) for name, result in results.items()}
    return figures


def small_checkpoint(folder: Path) -> Path:
    """sd15 with narrower networks, and weights of few bits, which compress."""
    import torch
    from families import SD_UNET, SD_VAE, TEXT, make_text_encoder, make_unet, make_vae, sd15

    unet = {**SD_UNET, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16}
    vae = {**SD_VAE, "block_out_channels": (4, 4, 4, 8), "norm_num_groups": 2}
    text = {**TEXT, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "projection_dim": 16}
    networks = {
        "unet": make_unet(unet, seed=0),
        "vae": make_vae(vae, seed=0),
        "text_encoder": make_text_encoder(text, seed=0),
    }
    sd15(folder)
    for name, network in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.bfloat16())
        network.save_pretrained(folder / name)
    return folder


def write_fixtures(python: Path, work: Path, fixtures: Path) -> None:
    """Write a folder of optimum's, and what optimum drew from it and from our bundles, for the tests."""
    from families import FAMILIES

    folders = {"optimum": work / "sd"}
    export_with_optimum(python, use_older_names(small_checkpoint(work / "checkpoint")), folders["optimum"])
    for family in ("sd15", "sdxl_base"):
        folders[family] = work / family / "bundle"
        export_with_latentrt(use_older_names(FAMILIES[family](work / family / "checkpoint")), folders[family])
    wanted = ("own scheduler", "DPM++ 2M Karras", "Euler a")
    chosen = {
        (source, case.name): case
        for source in folders
        for case in cases()
        if case.name in wanted and case.family == ("sd15" if source == "optimum" else source)
    }
    drawings = {
        f"{source}: {name}": drawing(case, "optimum", folders[source], Path())
        for (source, name), case in chosen.items()
    }
    (work / "drawings.json").write_text(json.dumps(drawings))
    run([python, HERE / "optimum_draw.py", work / "drawings.json", work / "drawn.npz"])
    drawn = np.load(work / "drawn.npz")
    pictures = {name: np.rint(drawn[f"{name}/picture"] * 255).astype(np.uint8) for name in drawings}
    latents = {f"{name}/latents": drawn[f"{name}/latents"] for name in drawings}
    fixtures.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(fixtures / "drawn.npz", **latents, **{f"{name}/picture": p for name, p in pictures.items()})
    size = {"height": SIZE, "width": SIZE}
    settings = {f"{source}: {name}": settings_of(case) | size for (source, name), case in chosen.items()}
    told = {"optimum": versions_in(python), "drawings": settings}
    (fixtures / "drawn.json").write_text(json.dumps(told, indent=1) + "\n")
    with zipfile.ZipFile(fixtures / "sd.zip", "w", zipfile.ZIP_LZMA) as archive:
        for path in sorted(folders["optimum"].rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folders["optimum"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path("build/optimum-venv"), help="made if it is not there")
    parser.add_argument("--work", type=Path, help="where to keep checkpoints and exports; default a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--fixtures", type=Path, help="write what the tests compare with to this folder, and stop")
    options = parser.parse_args()
    python = ensure_venv(options.venv.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        work = (options.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if options.fixtures:
            write_fixtures(python, work, options.fixtures)
            return
        figures = compare(python, work)
    names = ("optimum on bundle", "latentrt on bundle", "optimum on optimum", "latentrt on optimum")
    print(f"{'from diffusers: latents, levels':50}" + "".join(f"{name:>22}" for name in names))
    for key, found in figures.items():
        cells = [f"{found[name]['latents']:.1e} {found[name]['levels']:3d}" for name in names]
        print(f"{key:50}" + "".join(f"{cell:>22}" for cell in cells))
    known = {case.key for case in OVERWRITTEN}
    if options.json:
        report = {
            "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
            "optimum": versions_in(python),
            "latentrt": {
                name: version(name) for name in ("latentrt", "torch", "diffusers", "transformers", "onnxruntime")
            },
            "size": SIZE,
            "steps": STEPS,
            "differences": figures,
            "optimum overwrites its latents": sorted(known),
            "gpu": "not run on a GPU",
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    far = [
        f"{key}, {name}"
        for key, found in figures.items()
        for name, values in found.items()
        if not (values["latents"] <= LATENTS_BOUND and values["levels"] <= LEVELS_BOUND)
        and not (key in known and name.startswith("optimum"))
    ]
    if far:
        raise SystemExit(f"expected the pictures of diffusers, got others: {'; '.join(far)}")


if __name__ == "__main__":
    main()
