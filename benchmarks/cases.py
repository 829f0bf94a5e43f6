"""What is measured: systems with their networks loaded, and the settings that they draw with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

System: TypeAlias = Literal["latentrt", "diffusers", "torch-compile", "optimum"]
OURS: System = "latentrt"
PEERS: tuple[System, ...] = ("diffusers", "torch-compile", "optimum")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A system with its networks loaded for one size, in a process of its own.

    Attributes:
        precision: of the networks, as it was asked for.
        backend: of latentrt: auto, onnxruntime, cuda, tensorrt or tensorrt_rtx. Of peers: cpu or cuda.
        width: of the pictures, in pixels.
        batch: pictures of a run, drawn side by side.
    """

    system: System
    precision: str
    backend: str
    width: int
    height: int
    batch: int

    @property
    def label(self) -> str:
        """For people, without size and batch: `latentrt fp16, onnxruntime`."""
        return ", ".join(self.parts[:2])

    @property
    def parts(self) -> tuple[str, ...]:
        """For people: system with precision, backend, size, batch."""
        return (
            f"{self.system} {self.precision}",
            self.backend,
            f"{self.width}x{self.height}",
            f"batch {self.batch}",
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run draws.

    Attributes:
        sampler: in latentrt's main spelling, such as `DPM++ 2M`.
        schedule: spacing of the noise levels; None for the sampler's or checkpoint's own.
        guidance: scale; 1 and below are unguided.
        guidance_interval: shares of the steps between which guidance is on.
    """

    sampler: str
    schedule: str | None
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    @property
    def label(self) -> str:
        """For people: `DPM++ 2M karras, 20 steps, guidance 5`."""
        return ", ".join(self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """For people: sampler with schedule, steps, guidance."""
        start, end = self.guidance_interval
        within = "" if (start, end) == (0.0, 1.0) else f" from {start:g} to {end:g}"
        name = self.sampler if self.schedule is None else f"{self.sampler} {self.schedule}"
        return (name, f"{self.steps} steps", f"guidance {self.guidance:g}{within}")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a benchmark."""

    subject: Subject
    settings: Settings

    @property
    def label(self) -> str:
        """For people, the whole of it; two cases of a run never share it."""
        return ", ".join(self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """What the label is made of."""
        return (*self.subject.parts, *self.settings.parts)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where the systems find the model.

    Attributes:
        bundle: of latentrt, resolved.
        checkpoint: of diffusers, for peers that need one: folder or single file; None if there is none at hand.
        optimum_python: interpreter of an environment with optimum-onnx; None for this one.
        optimum_model: folder that `optimum-cli export onnx` wrote; None for the bundle itself, which has its layout.
        threads: of processor that each system may use; 0 for all.
        options: further ones of `Pipeline.load`: residency, loras.
    """

    bundle: str
    checkpoint: str | None = None
    optimum_python: str | None = None
    optimum_model: str | None = None
    threads: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
