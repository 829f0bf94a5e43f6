"""Make one component's graph in one precision, and prove it against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import onnx_ir as ir

from latentrt.runtime.session import OnnxSession

from .activation_range import activation_ranges
from .component import Component
from .config_checks import time_ids
from .controlnet import controlnet_component
from .fp16 import Float16Pass, cast_count, check_overflow
from .half_rounding import HalfRoundingPass
from .parity import BOUNDS, Case, measure
from .shared_weights import save_sharing
from .text_encoder import text_encoder_2_component, text_encoder_component
from .to_onnx import save_onnx, to_onnx
from .unet import unet_component
from .vae import taesd_decoder_component, vae_decoder_component, vae_encoder_component


class _SdxlSizes(TypedDict, total=False):
    pooled: int
    ids: int


def components_of(pipeline: Any, extras: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Component]:
    """The components of a diffusers pipeline and of what stands beside it, by their name in a bundle.

    Args:
        pipeline: as `load_pipeline` makes it.
        extras: ControlNets and TAESD, as `load_extras` makes them.
    """
    found: dict[str, Component] = {}
    if getattr(pipeline, "text_encoder", None) is not None:
        found["text_encoder"] = text_encoder_component(pipeline.text_encoder)
    added: _SdxlSizes = {}
    if getattr(pipeline, "text_encoder_2", None) is not None:
        found["text_encoder_2"] = text_encoder_2_component(pipeline.text_encoder_2)
        pooled = int(pipeline.text_encoder_2.config.projection_dim)
        added = {"pooled": pooled, "ids": time_ids(pipeline.unet.config, pooled)}
    found["unet"] = unet_component(pipeline.unet, **added)
    controlnets = {name: model for name, model in extras.items() if name.startswith("controlnet")}
    if controlnets:
        found["unet_control"] = unet_component(pipeline.unet, **added, residuals=True)
    for name, model in controlnets.items():
        found[name] = controlnet_component(model, name, **added)
    found["vae_decoder"] = vae_decoder_component(pipeline.vae)
    found["vae_encoder"] = vae_encoder_component(pipeline.vae)
    if "taesd" in extras:
        found["taesd_decoder"] = taesd_decoder_component(extras["taesd"])
    return found


def build_fp32(
    component: Component, path: Path, cases: Sequence[Case], *, opset: int, holder: Path | None = None
) -> dict[str, Any]:
    """Export to `path` and compare in ONNX Runtime.

    Args:
        holder: a graph in the same folder whose external data may hold the weights too.

    Returns:
        The parity figures.

    Raises:
        ExportError: the export failed or a figure is out of bounds.
    """
    _save(to_onnx(component, opset=opset), path, holder)
    return measure(OnnxSession(path), cases, name=f"{component.spec.name} fp32", bound=BOUNDS["fp32"])


def _save(model: ir.Model, path: Path, holder: Path | None) -> None:
    if holder is None:
        save_onnx(model, path)
    else:
        save_sharing(model, path, holder)


def build_fp16(
    component: str, source: Path, path: Path, cases: Sequence[Case], *, holder: Path | None = None
) -> dict[str, Any]:
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
    _save(model, path, holder)
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
