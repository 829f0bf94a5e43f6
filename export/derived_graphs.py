"""Graphs that are made from another component's: its weights, other inputs or outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import ExportError
from latentrt.runtime.image import to_uint8
from latentrt.runtime.prompt_keys import CACHED, PROMPT
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array

from .graph_files import save_sharing
from .parity import BOUNDS, Case, measure
from .prompt_keys import split_prompt
from .vae_pictures import PictureOutputPass


@dataclass(frozen=True)
class DerivedGraph:
    """A graph that was made and proven: its files, itself first, and its figures."""

    files: tuple[Path, ...]
    parity: dict[str, Any]


def build_uint8_decoder(
    source: Path, path: Path, config: Mapping[str, Any], cases: Sequence[Case], *, precision: str
) -> DerivedGraph:
    """The VAE decoder that takes the U-Net's latents and gives uint8 pictures.

    Args:
        source: the decoder's graph.
        path: where to write, in the same folder.
        config: of the VAE.
        cases: of the decoder.

    Raises:
        ExportError: the pictures are not, byte for byte, those that the runtime makes of the decoder's output.
    """
    # A missing factor is diffusers' default.
    scaling, shift = float(config.get("scaling_factor") or 0.18215), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    model = ir.load(source)
    PictureOutputPass(scaling, shift, mean, std)(model)
    files = save_sharing(model, path, source)
    plain, pictures = OnnxSession(source, optimize=False), OnnxSession(path, optimize=False)
    figures: dict[str, Any] = {}
    # The runtime's arithmetic: the rounding of a division belongs to both sides.
    factor, offset, spread = (np.asarray(number, np.float32) for number in (scaling, shift, 1))
    if mean is not None and std is not None:
        offset, spread = (np.asarray(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    for case in cases:
        latents = (case.feeds["latent_sample"].astype(np.float32) - offset) * factor / spread
        wanted = to_uint8(plain({"latent_sample": latents * spread / factor + offset})["sample"])
        found = pictures({"latent_sample": latents})["picture"]
        differing = int((wanted != found).sum())
        if differing:
            raise ExportError(
                f"{PICTURES} {precision}: expected the bytes that the decoder's floats give, got {differing} of "
                f"{found.size} others for {case.name}."
            )
        figures[case.name] = {"differing_bytes": differing}
    return DerivedGraph(files, {**figures, "worst_relative_l2": 0.0})


def build_prompt_split(
    source: Path, paths: Mapping[str, Path], cases: Sequence[Case], *, precision: str
) -> dict[str, DerivedGraph]:
    """The U-Net in two graphs: what depends on the prompt alone, and the rest.

    Args:
        source: the U-Net's graph.
        paths: where to write `unet_prompt` and `unet_cached`, in the same folder.
        cases: of the U-Net.

    Raises:
        ExportError: the two together do not compute what the U-Net does.
    """
    prompt, cached = split_prompt(ir.load(source))
    files = {PROMPT: save_sharing(prompt, paths[PROMPT], source), CACHED: save_sharing(cached, paths[CACHED], source)}
    first, second = (OnnxSession(paths[name], optimize=False) for name in (PROMPT, CACHED))
    wanted = {tensor.name for tensor in second.spec.inputs}

    def both(feeds: Mapping[str, Array]) -> dict[str, Array]:
        keys = first({"encoder_hidden_states": feeds["encoder_hidden_states"]})
        return second({name: value for name, value in {**feeds, **keys}.items() if name in wanted})

    figures = measure(both, cases, name=f"{CACHED} {precision}", bound=BOUNDS[precision])
    return {name: DerivedGraph(files[name], figures) for name in paths}
