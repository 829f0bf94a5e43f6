"""The sidecar of an engine: what it is, readable without TensorRT, and why it can or cannot be used here.

TensorRT has no call that says beforehand whether an engine fits a machine, so `<key>.json` beside `<key>.engine`
says it. Reading it needs no backend and no GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ArtifactError
from .machine import Machine
from .specs import TensorSpec
from .trt_flavour import DATA_CENTRE_SMS, install_command

SIDECAR_VERSION = 1
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
        profiles: shapes by input.
        tensor_bytes: inputs and outputs at their largest shapes; None if an output's shape is not known.
        weight_bytes: weights on the device; None if the builder did not say.
        activation_bytes: scratch memory of the profile; None if the builder did not say.
        engine_bytes: size of the engine file.
        obtained: how each of the figures was obtained.
        made_from: everything that the key is the hash of.
        inspected_layers: layers of the built engine by type, from the engine inspector; empty where it needs a GPU
            that was not there.
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
    profiles: Mapping[str, ShapeProfile]
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

    profiles = {
        name: ShapeProfile(**{bound: tuple(shape) for bound, shape in profile.items()})
        for name, profile in content["profiles"].items()
    }
    return EngineSidecar(
        **{
            **content,
            "targets": tuple(content["targets"]),
            "flags": tuple(content["flags"]),
            "profiles": profiles,
            "inputs": tensors(content["inputs"]),
            "outputs": tensors(content["outputs"]),
            "precisions": PrecisionReadout(**content["precisions"]),
        }
    )


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
    if gpu.sm not in sidecar.targets:
        if sidecar.flavour == "tensorrt_rtx" and gpu.sm in DATA_CENTRE_SMS:
            build = f"{install_command('tensorrt')} and then {build} --flavour tensorrt"
        return (
            f"it was built for {', '.join(sidecar.targets)}, and this GPU ({gpu.name}) is {gpu.sm}. "
            f"Run: {build} --target {gpu.sm}"
        )
    if package.version != sidecar.flavour_version:
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
