"""Make one component's graph in one precision, and prove it against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.runtime.session import OnnxSession

from .activation_range import activation_ranges
from .component import Component
from .fp16 import Float16Pass, cast_count, check_overflow
from .half_rounding import HalfRoundingPass
from .parity import BOUNDS, Case, measure
from .text_encoder import text_encoder_component
from .to_onnx import save_onnx, to_onnx
from .unet import unet_component
from .vae import vae_decoder_component, vae_encoder_component


def components_of(pipeline: Any) -> dict[str, Component]:
    """The components of a `StableDiffusionPipeline`, by their name in a bundle."""
    return {
        "text_encoder": text_encoder_component(pipeline.text_encoder),
        "unet": unet_component(pipeline.unet),
        "vae_decoder": vae_decoder_component(pipeline.vae),
        "vae_encoder": vae_encoder_component(pipeline.vae),
    }


def build_fp32(component: Component, path: Path, cases: Sequence[Case], *, opset: int) -> dict[str, Any]:
    """Export to `path` and compare in ONNX Runtime.

    Returns:
        The parity figures.

    Raises:
        ExportError: the export failed or a figure is out of bounds.
    """
    save_onnx(to_onnx(component, opset=opset), path)
    return measure(OnnxSession(path), cases, name=f"{component.spec.name} fp32", bound=BOUNDS["fp32"])


def build_fp16(component: str, source: Path, path: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Convert the fp32 graph at `source` to fp16 at `path`, and compare with the fp32 model.

    The graph itself has to run, finite and within bounds; the figures are those of the fp32 graph rounded to
    float16 after every operator, because ONNX Runtime's CPU rounds an fp16 graph too rarely (see half_rounding).

    Returns:
        The parity figures, with `nearest_overflow` and the number of `casts`.

    Raises:
        ExportError: an activation or a weight overflows, or a figure is out of bounds.
    """
    model = ir.load(source)
    ranges = activation_ranges(source, [case.feeds for case in cases])
    nearest = check_overflow(model, ranges, name=component)
    Float16Pass()(model)
    save_onnx(model, path)
    name, bound = f"{component} fp16", BOUNDS["fp16"]
    measure(OnnxSession(path), cases, name=name, bound=bound)
    figures = measure(_rounded_session(source, path.with_name("rounded.onnx")), cases, name=name, bound=bound)
    return {**figures, "nearest_overflow": nearest, "casts": cast_count(model)}


def _rounded_session(source: Path, scratch: Path) -> OnnxSession:
    """A session of the fp32 graph with float16 rounding; the file it is loaded from is gone afterwards."""
    model = ir.load(source)
    HalfRoundingPass()(model)
    files = save_onnx(model, scratch)
    try:
        return OnnxSession(scratch)
    finally:
        for file in files:
            file.unlink()
