"""Which engines of a bundle can run a component here, why not the others, and which of them holds a set of shapes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import Bundle
from .engine_sidecar import (
    PICTURE_READERS,
    EngineSidecar,
    covers,
    describe_profiles,
    read_sidecar,
    why_unusable,
)
from .errors import LatentrtError
from .machine import Machine
from .manifest import EngineRecord, Manifest, problem_of
from .specs import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]

_CHUNK = 77  # tokens
_EDITING_CHANNELS = 8  # of the sample of a U-Net that edits a picture


@dataclass(frozen=True)
class HeldEngine:
    """An engine of a bundle whose sidecar was read and speaks for it; the engine itself was not opened yet.

    Attributes:
        graph: the .onnx file that it was built from.
    """

    bundle: Path
    record: EngineRecord
    sidecar: EngineSidecar
    graph: Path

    @property
    def path(self) -> Path:
        """The engine's file."""
        return self.bundle / self.record.path

    @property
    def spec(self) -> ModelSpec:
        """Its inputs and outputs, as its sidecar states them."""
        return ModelSpec(self.record.component, self.sidecar.inputs, self.sidecar.outputs)


@dataclass(frozen=True)
class ExaminedEngines:
    """The engines that a component can run from, in the manifest's order, and why it cannot from the others.

    Attributes:
        refused: the reasons; first of those that were built for this machine's GPU.
    """

    usable: tuple[HeldEngine, ...]
    refused: tuple[str, ...]


def choose_engines(
    bundle: Bundle, component: str, precision: str, machine: Machine, *, flavours: Sequence[str]
) -> ExaminedEngines:
    """Look at a bundle's engines of a component; nothing but sidecars is read, and no backend is needed."""
    usable: list[HeldEngine] = []
    refused: list[str] = []
    sm = machine.gpus[0].sm if machine.gpus else ""
    manifest = bundle.manifest
    graph = None if manifest is None else manifest.artifact(component, precision)
    if manifest is None or graph is None:
        return ExaminedEngines((), ())
    for record in sorted(manifest.engines, key=lambda record: sm not in record.targets):
        if (record.component, record.precision) == (component, precision) and record.flavour in flavours:
            sidecar, problem = examine_engine(bundle.path, manifest, record, machine)
            if sidecar is not None and problem is None:
                usable.append(HeldEngine(bundle.path, record, sidecar, bundle.path / graph.path))
            elif problem is not None:
                # What is wrong with a file is said with its name; what is wrong with its use is not.
                named = problem.startswith(str(bundle.path))
                refused.append(problem if named else f"{bundle.path / record.path}: {problem}")
    return ExaminedEngines(tuple(usable), tuple(refused))


def examine_engine(
    bundle: Path, manifest: Manifest, record: EngineRecord, machine: Machine
) -> tuple[EngineSidecar | None, str | None]:
    """An engine's sidecar, and what is wrong with the engine on a machine, or None.

    The engine's size is compared with the manifest, its SHA-256 only when it is loaded: it is long.
    """
    problem = problem_of(bundle, manifest, record.path, hashes=False) or problem_of(bundle, manifest, record.sidecar)
    if problem is not None:
        return None, problem
    try:
        sidecar = read_sidecar(bundle / record.sidecar)
    except LatentrtError as err:
        return None, str(err)
    if sidecar.engine_sha256 != manifest.files[record.path].sha256:
        return sidecar, "its sidecar describes another engine. Run: latentrt build again"
    artifact = manifest.artifact(record.component, record.precision)
    current = {} if artifact is None else {name: manifest.files[name].sha256 for name in artifact.files}
    if current != sidecar.onnx:
        return sidecar, "it was made from an older graph than the bundle holds. Run: latentrt build again"
    return sidecar, why_unusable(sidecar, machine)


def holding(engines: Sequence[HeldEngine], shapes: Shapes) -> HeldEngine | None:
    """The engine whose profile holds a set of input shapes the tightest, or None if no engine does."""

    def looseness(engine: HeldEngine) -> float:
        index = covers(engine.sidecar, shapes)
        if index is None:
            return math.inf
        return sum(math.prod(item.max) for item in engine.sidecar.profiles[index].values())

    best = min(engines, key=looseness, default=None)
    return None if best is None or looseness(best) == math.inf else best


def no_profile(engines: Sequence[HeldEngine], shapes: Shapes) -> str:
    """What to say of shapes that none of a component's engines holds: what they hold, and how to make one that does."""
    held = "; ".join(dict.fromkeys(describe_profiles(engine.sidecar) for engine in engines))
    wanted = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    component = engines[0].record.component
    return (
        f"{component}: expected shapes that its engines hold ({held}), got {wanted}. "
        f"Run: {build_command(engines[0], shapes)}"
    )


def build_command(engine: HeldEngine, shapes: Shapes) -> str:
    """The `latentrt build` that makes an engine like another for a set of input shapes, in the words of its options."""
    sidecar = engine.sidecar
    words = ["--components", sidecar.component, "--precision", sidecar.precision, "--flavour", sidecar.flavour]
    words += ["--target", "+".join(sidecar.targets)]
    picture = next((shape for shape in shapes.values() if len(shape) == 4), None)
    if picture is not None:
        scale = 1 if sidecar.component in PICTURE_READERS else sidecar.pixels_per_latent
        words += ["--size", f"{picture[2] * scale}x{picture[3] * scale}"]
    if "timestep" in shapes:
        words += ["--batch", str(_images(shapes))]
    if "encoder_hidden_states" in shapes:
        words += ["--text-chunks", str(max(shapes["encoder_hidden_states"][1] // _CHUNK, 1))]
    return shlex.join(["latentrt", "build", str(engine.bundle), *words])


def _images(shapes: Shapes) -> int:
    """For how many images a build makes a profile of so many rows: with guidance an image takes two, editing three."""
    rows = shapes["sample"][0]
    guided = 1 if "timestep_cond" in shapes else 3 if shapes["sample"][1] == _EDITING_CHANNELS else 2
    return rows // guided if rows % guided == 0 else rows
