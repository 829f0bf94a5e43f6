"""The sidecar of an engine: what it is, readable without TensorRT, and why it can or cannot be used here.

TensorRT has no call that says beforehand whether an engine fits a machine, so `<key>.json` beside `<key>.engine`
says it. Reading it needs no backend and no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .machine import Machine
from .specs import TensorSpec
from .trt_flavour import DATA_CENTRE_SMS, install_command, sm_number

SIDECAR_VERSION = 2
# Components whose images are pixels already, not latents.
PICTURE_READERS = ("vae_encoder", "safety_checker")
_KIND = "latentrt engine sidecar"


@dataclass(frozen=True)
class ShapeProfile:
    """The smallest, the most usual and the largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class PrecisionReadout:
    """Which types an engine computes in.

    Attributes:
        layers: number of layers with weights (convolutions, matrix products) by type: Half, Float, Int8…
        weights: number of their weights by type.
        method: how this was read.
    """

    layers: Mapping[str, int]
    weights: Mapping[str, int]
    method: str

    def share(self, dtype: str) -> float:
        """The part of the weights that is used in a type, 0 to 1; NaN if there are no weights."""
        total = sum(self.weights.values())
        return self.weights.get(dtype, 0) / total if total else float("nan")


@dataclass(frozen=True)
class BuildAttempt:
    """A build that failed before the one that made the engine: what it was given and what stopped it."""

    settings: Mapping[str, Any]
    problem: str
    seconds: float


@dataclass(frozen=True)
class EngineSidecar:
    """What an engine is and what it was made from.

    Attributes:
        flavour: `tensorrt` or `tensorrt_rtx`; `flavour_version` its exact version.
        cuda_major: the CUDA major version of that package, where its name states it.
        targets: the compute capabilities it runs on.
        gpu_name: the GPU it was built on, or None if it was built ahead of time.
        platform: where it was built, such as `linux_x86_64`.
        onnx: SHA-256 of the graph and its external data, by file.
        flags: builder flags.
        profiles: shapes by input, one mapping for each optimization profile, in the engine's order.
        tensor_bytes: inputs and outputs at their largest shapes; None if an output's shape is not known.
        weight_bytes: weights on the device; None if the builder did not say.
        activation_bytes: scratch memory of the profile; None if the builder did not say.
        engine_bytes: size of the engine file.
        obtained: how each of the figures was obtained.
        made_from: everything that the key is the hash of.
        inspected_layers: layers of the built engine by type, from the engine inspector; empty where it needs a GPU
            that was not there.
        flops: share of the floating point operations by type, at the first profile's usual shapes.
        refit: whose weights may be replaced in a loaded engine: `none`, `individual` (those of `refittable`) or `all`.
        refittable: names of the weights that may be replaced, as the graph's initializers are named.
        stripped: the engine holds no weights, with `individual` none of `refittable`; the graph's are put in when it is
            loaded.
        thin: the file leaves out what the graph holds, and is made whole again when it is loaded.
        compatibility: flags that let other versions or GPUs load it, such as `version_compatible`.
        attempts: builds that failed before, in order.
        layer_report: file beside the engine that lists its layers, or None.
        pixels_per_latent: pixels of a picture for each value of a latent, along one side.
    """

    component: str
    precision: str
    key: str
    flavour: str
    flavour_version: str
    cuda_major: int | None
    targets: tuple[str, ...]
    gpu_name: str | None
    platform: str
    onnx: Mapping[str, str]
    flags: tuple[str, ...]
    profiles: tuple[Mapping[str, ShapeProfile], ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precisions: PrecisionReadout
    build_seconds: float
    engine_bytes: int
    engine_sha256: str
    weight_bytes: int | None
    activation_bytes: int | None
    tensor_bytes: int | None
    obtained: Mapping[str, str]
    made_from: Mapping[str, Any]
    inspected_layers: Mapping[str, int] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    refit: str = "none"
    refittable: tuple[str, ...] = ()
    stripped: bool = False
    thin: bool = False
    compatibility: tuple[str, ...] = ()
    attempts: tuple[BuildAttempt, ...] = ()
    layer_report: str | None = None
    pixels_per_latent: int = 8
    sidecar_version: int = SIDECAR_VERSION
    kind: str = _KIND


def sidecar_json(sidecar: EngineSidecar) -> bytes:
    """The sidecar as the text of its file."""
    return json.dumps(dataclasses.asdict(sidecar), indent=1, sort_keys=True).encode() + b"\n"


def read_sidecar(path: Path) -> EngineSidecar:
    """Read a sidecar file.

    Raises:
        ArtifactError: it is missing, damaged, or of a newer latentrt.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: expected an engine's sidecar, got {err}. Run: latentrt build BUNDLE") from err
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ArtifactError(f"{path}: expected a {_KIND}, got another file. Run: latentrt build BUNDLE")
    version = content.get("sidecar_version")
    if not (isinstance(version, int) and version <= SIDECAR_VERSION):
        raise ArtifactError(
            f"{path}: expected sidecar version {SIDECAR_VERSION} or older, got {version}. Upgrade latentrt."
        )
    try:
        return _decode(content)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise ArtifactError(f"{path}: expected a complete sidecar, got {err!r}. Run: latentrt build BUNDLE") from err


def _decode(content: dict[str, Any]) -> EngineSidecar:
    def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(**{**item, "shape": tuple(item["shape"])}) for item in items)

    # Version 1 knew one profile to an engine and wrote it without the list.
    mappings = content["profiles"] if content["sidecar_version"] > 1 else [content["profiles"]]
    profiles = tuple(
        {
            name: ShapeProfile(**{bound: tuple(shape) for bound, shape in profile.items()})
            for name, profile in mapping.items()
        }
        for mapping in mappings
    )
    fields = {
        **content,
        "sidecar_version": SIDECAR_VERSION,
        "profiles": profiles,
        "inputs": tensors(content["inputs"]),
        "outputs": tensors(content["outputs"]),
        "precisions": PrecisionReadout(**content["precisions"]),
        "attempts": tuple(BuildAttempt(**attempt) for attempt in content.get("attempts", ())),
    }
    for name in ("targets", "flags", "refittable", "compatibility"):
        if name in content:
            fields[name] = tuple(content[name])
    return EngineSidecar(**fields)


def covers(sidecar: EngineSidecar, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The index of the tightest profile that holds a set of input shapes, or None if none does.

    The tightest is the one whose largest shapes are the smallest, of equal ones the one with the least to span: it was
    tuned the closest to these shapes.

    Args:
        shapes: by input, of every input.
    """
    held = [index for index, profile in enumerate(sidecar.profiles) if _holds(profile, shapes)]

    def looseness(index: int) -> tuple[int, int]:
        profile = sidecar.profiles[index].values()
        return sum(math.prod(item.max) for item in profile), -sum(math.prod(item.min) for item in profile)

    return min(held, key=looseness, default=None)


def _holds(profile: Mapping[str, ShapeProfile], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return profile.keys() == shapes.keys() and all(
        len(shape) == len(profile[name].min)
        and all(
            low <= size <= high for low, size, high in zip(profile[name].min, shape, profile[name].max, strict=True)
        )
        for name, shape in shapes.items()
    )


def describe_profiles(sidecar: EngineSidecar) -> str:
    """The sizes that an engine holds, in pixels and rows, for people: `512x512 pixels, 2 or 4 rows of 77 tokens`."""
    sizes = list(dict.fromkeys(_describe(sidecar, profile) for profile in sidecar.profiles))
    guided = sidecar.component.startswith(("unet", "controlnet"))
    return "; ".join(sizes) + (" (an image takes one row, with guidance two)" if guided else "")


def _describe(sidecar: EngineSidecar, profile: Mapping[str, ShapeProfile]) -> str:
    def span(item: ShapeProfile, axis: int, factor: int = 1) -> str:
        low, high = item.min[axis] * factor, item.max[axis] * factor
        return f"{low}" if low == high else f"{low}..{high}"

    words = []
    first = next(iter(profile.values()))
    picture = next((item for item in profile.values() if len(item.max) == 4), None)
    if picture is not None:
        factor = 1 if sidecar.component in PICTURE_READERS else sidecar.pixels_per_latent
        words.append(f"{span(picture, 2, factor)}x{span(picture, 3, factor)} pixels")
    text = profile.get("encoder_hidden_states") or profile.get("input_ids")
    length = "" if text is None else f" of {span(text, 1)} tokens"
    rows = span(first, 0)
    return ", ".join([*words, f"{rows} {'row' if rows == '1' else 'rows'}{length}"])


def why_unusable(sidecar: EngineSidecar, machine: Machine, *, device: int = 0) -> str | None:
    """Why an engine cannot be used on a machine and what to do, or None if nothing speaks against it.

    Args:
        device: which of the machine's GPUs.
    """
    build = f"latentrt build BUNDLE --components {sidecar.component} --precision {sidecar.precision}"
    package = machine.packages.get(sidecar.flavour)
    if package is None:
        return f"it needs {sidecar.flavour}, which is not installed. Run: {install_command(sidecar.flavour)}"
    if not machine.gpus:
        return (
            f"it needs an NVIDIA GPU ({' or '.join(sidecar.targets)}), and none can be used here: "
            f"{machine.why_no_gpu or 'there is none'}. Run it on a machine with one, or generate with ONNX Runtime."
        )
    if not 0 <= device < len(machine.gpus):
        return f"GPU {device} was asked for, and this machine has {len(machine.gpus)}. Choose another device."
    gpu = machine.gpus[device]
    if not _runs_on(sidecar, gpu.sm):
        if sidecar.flavour == "tensorrt_rtx" and gpu.sm in DATA_CENTRE_SMS:
            build = f"{install_command('tensorrt')} and then {build} --flavour tensorrt"
        return (
            f"it was built for {', '.join(sidecar.targets)}, and this GPU ({gpu.name}) is {gpu.sm}. "
            f"Run: {build} --target {gpu.sm}"
        )
    if not _is_read_by(sidecar, package.version):
        return (
            f"it was built with {sidecar.flavour} {sidecar.flavour_version}, and {package.version} is installed. "
            f"Run: {build} --target {gpu.sm}"
        )
    if package.cuda_major is not None and machine.cuda is not None and machine.cuda[0] < package.cuda_major:
        return (
            f"{sidecar.flavour} {package.version} needs a driver for CUDA {package.cuda_major}, and this one supports "
            f"{machine.cuda[0]}.{machine.cuda[1]}. Update the NVIDIA driver."
        )
    if sidecar.flavour == "tensorrt" and machine.platform != sidecar.platform:
        return f"it was built on {sidecar.platform}, and this is {machine.platform}. Run: {build} --target {gpu.sm}"
    return None


def _runs_on(sidecar: EngineSidecar, sm: str) -> bool:
    return sm in sidecar.targets or ("ampere_plus" in sidecar.compatibility and sm_number(sm) >= 80)


def _is_read_by(sidecar: EngineSidecar, version: str) -> bool:
    """Whether a version of its flavour reads an engine: its own, or with that flag a later one of the same major."""
    if "version_compatible" not in sidecar.compatibility:
        return version == sidecar.flavour_version
    versions = (sidecar.flavour_version, version)
    ours, theirs = ([int(part) for part in text.split(".") if part.isdigit()] for text in versions)
    return ours[:1] == theirs[:1] and theirs >= ours
