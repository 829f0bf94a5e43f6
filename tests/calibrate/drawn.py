"""A bundle without networks, a pipeline that draws known pictures from it, and what is found of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from latentrt.calibrate.plan import LayerPlan, Plan
from latentrt.runtime.image import Pictures
from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, save_manifest

SIDE = 16
# What each precision adds to a level of the fp32 pictures.
STEPS = {"fp32": 0, "fp16": 1, "int8": 4}
PROMPTS = ("light", "dark", "light as day", "a <b>dark</b> & stormy night")


def picture(prompt: str, seed: int, precision: str) -> Pictures:
    """Noise of the seed around a level of the prompt."""
    level = 60 if "dark" in prompt else 180
    pixels = np.random.default_rng(seed).integers(level - 40, level + 40, (SIDE, SIDE, 3))
    return (pixels + STEPS[precision]).astype(np.uint8)


def write_bundle(folder: Path, **digests: str) -> Path:
    """A manifest that names a U-Net in each precision by its hash; there are no files."""
    digests = {"fp32": "a", "fp16": "b", "int8": "c"} | digests
    save_bundle = {f"unet/{name}.onnx": FileRecord(digest, 1) for name, digest in digests.items()}
    folder.mkdir(exist_ok=True)
    artifacts = tuple(
        Artifact("unet", name, f"unet/{name}.onnx", (f"unet/{name}.onnx",), 20, digest, {}, {}, 1)
        for name, digest in digests.items()
    )
    manifest = Manifest("drawn", "StableDiffusionPipeline", "0", files=save_bundle, artifacts=artifacts)
    save_manifest(folder, manifest)
    return folder


@dataclass
class Painter:
    """In the place of the class Pipeline: notes what is drawn, and can be made to stop."""

    drawn: list[tuple[str, str, int]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    most: int = 1000

    def load(self, path: Path, *, precision: str, backend: str, loras: Any) -> _Opened:
        return _Opened(self, precision)


@dataclass
class _Opened:
    painter: Painter
    precision: str
    backend: str = "onnxruntime CPU"

    @property
    def precisions(self) -> dict[str, str]:
        return {"unet": self.precision, "vae_decoder": "fp16"}

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, kind: type | None, err: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def __call__(self, prompts: Sequence[str], *, seed: Sequence[int], **settings: Any) -> Any:
        if len(self.painter.drawn) >= self.painter.most:
            raise KeyboardInterrupt
        self.painter.settings.append(settings)
        self.painter.drawn += [(self.precision, prompt, own) for prompt, own in zip(prompts, seed, strict=True)]
        pictures = [picture(prompt, own, self.precision) for prompt, own in zip(prompts, seed, strict=True)]

        @dataclass
        class Result:
            images: Pictures

        return Result(np.stack(pictures))


def small_plan() -> Plan:
    """Four layers, two of them quantized, with noise and macs that are easy to add up."""
    layers = (
        ("unet.conv_in.weight", "conv_in", False, "first layer", None, 0.1),
        ("unet.a.to_q.weight", "attn1.to_q", True, "within the budget", 1e-4, 0.4),
        ("unet.a.ff.net.2.weight", "ff.net.2", False, "too noisy <for> this & that", 6e-4, 0.2),
        ("unet.b.to_q.weight", "attn1.to_q", True, "within the budget", 3e-4, 0.3),
    )
    return Plan(
        component="unet",
        kind="int8",
        graph={"unet/model.onnx": "f" * 64},
        loras=(),
        layers=tuple(
            LayerPlan(name, name, kind, quantized, reason, 0.1, noise, macs, macs)
            for name, kind, quantized, reason, noise, macs in layers
        ),
        vectors={},
        corrections={},
        made={"method": "output-error", "smooth": True, "alphas": [0.25, 0.5]},
    )
