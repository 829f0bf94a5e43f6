"""What a build is asked for, and what that means for a bundle: which components, in which precision and shapes."""

from __future__ import annotations

from dataclasses import dataclass

from latentrt.runtime.bundle import DRAWING, Bundle
from latentrt.runtime.errors import UsageError
from latentrt.runtime.latents import vae_factor
from latentrt.runtime.precisions import QUANTIZED, how_to_make

from .engine_profiles import ShapeRequest, parse_requests


@dataclass(frozen=True)
class BuildOptions:
    """What `latentrt build` is asked for, in the words of its command line.

    Attributes:
        target: `sm86,sm89` (an engine each), `sm86+sm89` (one for both) or `current`.
        precision: of the run, of which each component has its graph: for fp16 the mixed one where that would overflow,
            for int8 or fp8 the quantized U-Net and the others in half precision.
        batch, size, text_chunks: `4`, `1,2,4` (a profile each), `1..8` or `1..4..8` (min..opt..max).
        guidance: `both`, or `on` or `off` if it is so in every step.
        components: which; None for all that text-to-image uses.
        flavour: auto, tensorrt or tensorrt_rtx.
        workspace_mib: limit of the builder's scratch memory.
        optimization_level, version_compatible, hardware_compatibility, tiling, weight_streaming, narrow: of
            `EngineConfig`.
        refit: `none`, `lora` (the weights that the bundle's LoRAs change, or that LoRAs usually change) or `all`.
        strip: leave the weights out of the engine.
        timing_cache: of full TensorRT: auto, off or a file.
        cache: of engines: auto (the user's), off or a folder.
        force: build even what is up to date.
    """

    target: str = "current"
    precision: str = "fp16"
    batch: str = "1"
    size: str | None = None
    text_chunks: str = "1"
    guidance: str = "both"
    components: tuple[str, ...] | None = None
    flavour: str = "auto"
    workspace_mib: int | None = None
    optimization_level: int | None = None
    refit: str = "none"
    strip: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    tiling: str = "none"
    weight_streaming: bool = False
    narrow: bool = False
    timing_cache: str = "auto"
    cache: str = "auto"
    force: bool = False


def wanted_components(bundle: Bundle, options: BuildOptions) -> dict[str, str]:
    """The components to build, each with the precision of its graph.

    Raises:
        UsageError: the bundle lacks one of them in that precision; says how to make it.
    """
    present, precision = bundle.components(), options.precision
    graphs = {name: bundle.precision_of(name, precision) for name in present}
    held = {name: found for name, found in graphs.items() if found is not None}
    if options.components is not None:
        wanted = list(dict.fromkeys(options.components))
    else:
        # What draws beside a quantized U-Net is of no use without it.
        wanted = [name for name in (present if precision in QUANTIZED else held) if name in DRAWING]
    if missing := next((name for name in wanted if name not in held), None):
        found = ", ".join(bundle.held(missing) or held) or "none"
        raise UsageError(
            f"{bundle.path}: expected {missing} in {precision}, found {found}. "
            f"Run: {how_to_make(bundle.path, missing, precision)}"
        )
    if not wanted:
        found = ", ".join(sorted({name for component in present for name in bundle.held(component)})) or "none"
        raise UsageError(
            f"{bundle.path}: expected graphs in {precision}, found {found}. "
            f"Run: {how_to_make(bundle.path, DRAWING[0], precision)}"
        )
    return {name: held[name] for name in wanted}


def wanted_shapes(bundle: Bundle, options: BuildOptions) -> tuple[tuple[ShapeRequest, ...], int]:
    """The shapes to build for, and the pixels of a latent.

    Raises:
        UsageError: a size, batch or text length is not possible.
    """
    factor = vae_factor(bundle.config("vae_decoder/config.json"))
    sample_size = bundle.config("unet/config.json").get("sample_size")
    native = sample_size * factor if isinstance(sample_size, int) else None
    if options.size is None and native is None:
        raise UsageError("size: expected --size, because the U-Net's config states no sample_size.")
    requests = parse_requests(
        size=options.size or str(native),
        batch=options.batch,
        text_chunks=options.text_chunks,
        factor=factor,
        native=native,
        guidance=options.guidance,
    )
    return requests, factor
