"""Make one component's graph in one precision, and prove it against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import onnx_ir as ir

from latentrt.runtime.session import OnnxSession

from .component import Component
from .config_checks import time_ids
from .controlnet import controlnet_component
from .graph_files import save_onnx, save_sharing
from .half_builder import LARGE_BYTES, BuiltGraph, build_half, write_half
from .networks import Network
from .parity import BOUNDS, Case, measure
from .resources import release_memory
from .safety_checker import safety_checker_component
from .text_encoder import text_encoder_2_component, text_encoder_component
from .to_onnx import to_onnx
from .unet import unet_component
from .vae import taesd_decoder_component, vae_decoder_component, vae_encoder_component


class _SdxlSizes(TypedDict, total=False):
    pooled: int
    ids: int


def components_of(networks: Mapping[str, Network]) -> dict[str, Component]:
    """The components of a checkpoint, by their name in a bundle.

    Args:
        networks: by part.
    """
    modules: dict[str, Any] = {name: network.module for name, network in networks.items()}
    unet, vae = modules["unet"], modules["vae"]
    made: dict[str, tuple[str, Component]] = {}
    if "text_encoder" in modules:
        made["text_encoder"] = "text_encoder", text_encoder_component(modules["text_encoder"])
    added: _SdxlSizes = {}
    if "text_encoder_2" in modules:
        made["text_encoder_2"] = "text_encoder_2", text_encoder_2_component(modules["text_encoder_2"])
        pooled = int(modules["text_encoder_2"].config.projection_dim)
        added = {"pooled": pooled, "ids": time_ids(unet.config, pooled)}
    made["unet"] = "unet", unet_component(unet, **added)
    controlnets = [name for name in modules if name.startswith("controlnet")]
    if controlnets:
        made["unet_control"] = "unet", unet_component(unet, **added, residuals=True)
    for name in controlnets:
        made[name] = name, controlnet_component(modules[name], name, **added)
    made["vae_decoder"] = "vae", vae_decoder_component(vae)
    made["vae_encoder"] = "vae", vae_encoder_component(vae)
    if "safety_checker" in modules:
        made["safety_checker"] = "safety_checker", safety_checker_component(modules["safety_checker"])
    if "taesd" in modules:
        made["taesd_decoder"] = "taesd", taesd_decoder_component(modules["taesd"])
    return {name: component.with_weights(networks[part]) for name, (part, component) in made.items()}


def build_graph(
    component: Component,
    path_of: Callable[[str], Path],
    cases: Sequence[Case],
    *,
    precision: str,
    opset: int,
    cache: Path | None,
    holder_of: Callable[[str], Path | None] = lambda precision: None,
    plain: bool = True,
) -> BuiltGraph:
    """Export a component in one precision and compare it in ONNX Runtime.

    Args:
        path_of: where to write the graph of a precision.
        cases: what to compare on; of none, the graph is written and nothing is known of it.
        precision: fp32, fp16, bf16 or mixed. An fp16 graph that would overflow is made mixed instead.
        cache: a folder of graphs without weights, see `to_onnx`.
        holder_of: of a precision, a graph in the same folder whose external data may hold the weights too.
        plain: of half precision, also run the graph as it is, not only rounded as it is written.

    Raises:
        ExportError: the export failed or a figure is out of bounds.
    """

    def load() -> ir.Model:
        return to_onnx(component, opset=opset, cache=cache)

    def save(model: ir.Model, path: Path, precision: str) -> tuple[Path, ...]:
        holder = holder_of(precision)
        return save_onnx(model, path) if holder is None else save_sharing(model, path, holder)

    release_memory()
    name = component.spec.name
    if not cases and precision != "fp32":
        return BuiltGraph(precision, write_half(load, (), path_of(precision), precision, save)[1], {})
    if precision == "fp32":
        files = save(load(), path_of(precision), precision)
        if not cases:
            return BuiltGraph("fp32", files, {})
        session = OnnxSession(files[0], optimize=4 * component.parameters <= LARGE_BYTES)
        return BuiltGraph("fp32", files, measure(session, cases, name=f"{name} fp32", bound=BOUNDS["fp32"]))
    return build_half(name, load, path_of, cases, precision=precision, save=save, plain=plain)
