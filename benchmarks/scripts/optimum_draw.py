"""Draw pictures with optimum's pipelines, or with diffusers' own, for `optimum_interop.py`.

Runs in optimum's environment, where latentrt is not installed.

    python optimum_draw.py drawings.json drawn.npz
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image


def open_pipeline(drawing: Mapping[str, Any]) -> Any:
    """The pipeline of a folder: optimum's for ONNX graphs, diffusers' for PyTorch weights."""
    if drawing["library"] == "diffusers":
        opened = diffusers.DiffusionPipeline.from_pretrained(drawing["folder"])
        return getattr(diffusers, drawing["pipeline"]).from_pipe(opened) if drawing["pipeline"] else opened
    import optimum.onnxruntime as ort

    pipeline_class = getattr(ort, f"ORT{drawing['pipeline']}" if drawing["pipeline"] else "ORTDiffusionPipeline")
    return pipeline_class.from_pretrained(drawing["folder"], use_io_binding=drawing["io_binding"])


def draw(drawing: Mapping[str, Any]) -> tuple[Any, Any]:
    """The final latents (1, c, h/8, w/8) float32 and the picture (h, w, 3) float32 in [0, 1]."""
    pipe = open_pipeline(drawing)
    pipe.set_progress_bar_config(disable=True)
    if drawing["scheduler"]:
        scheduler = getattr(diffusers, drawing["scheduler"])
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **drawing["scheduler_options"])
    latents = []

    def keep(_: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        return tensors

    call = {name: Image.open(value) if name == "image" else value for name, value in drawing["call"].items()}
    generator = torch.Generator("cpu").manual_seed(drawing["seed"])
    picture = pipe(**call, generator=generator, output_type="np", callback_on_step_end=keep).images[0]
    return latents[-1].numpy(), picture


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    found = {}
    for name, drawing in json.loads(Path(sys.argv[1]).read_text()).items():
        found[f"{name}/latents"], found[f"{name}/picture"] = draw(drawing)
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
