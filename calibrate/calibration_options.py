"""What a calibration is to do, and what each of its parts draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentrt.runtime.errors import UsageError
from latentrt.runtime.precisions import CALIBRATED

from .budget import DEFAULT_BUDGET, Budget, parse_budgets
from .capture import DEFAULT_TIMESTEPS, CaptureOptions
from .pictures import Drawing
from .planning import PlanOptions
from .prompts import LEAST, PromptSplit
from .search import ROUNDS
from .solver import Solver, check_solver
from .statistics import DEFAULT_BINS, DEFAULT_ROWS

Part = Literal["calibration", "search", "verification"]

# Prompts to calibrate, to search and to verify with.
DEFAULT_COUNTS = (64, 8, 32)
# Prompts whose calls noise is taken from: it is a mean over very many numbers, which few calls tell well.
DEFAULT_NOISE_PROMPTS = 8
# Pictures of the parts have seeds of their own; the held-out ones those that a user would type.
_SEEDS: Mapping[Part, int] = {"verification": 0, "search": 100_000, "calibration": 200_000}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """What a calibration is to do.

    Attributes:
        component: unet or vae_decoder.
        numbers: how scales and vectors are chosen.
        budgets: to hold.
        prompts: a built-in set or a file.
        counts: prompts to calibrate, to search and to verify with; in proportion where there are fewer.
        timesteps: calls to keep of every prompt.
        settings: of all pictures: attributes of `Request` that JSON can hold.
        seed: of prompts, pictures and probes.
        loras: of the bundle, by name, with scales or None for each one's own.
        bins: to divide the timesteps into.
        rows: of every input to keep for output errors.
        noise_prompts: of the search, whose calls sensitivities are taken from, and of the verification, whose calls
            are predicted; at most.
        solver: greedy or milp.
        rounds: plans to measure at most.
        times: file of layer times; without one a layer costs its MACs.
        judge: `FILE.py:function` for prompt accuracy.
        lpips: weights of LPIPS.
        device: that PyTorch computes on.
        backend: that the runtime draws with.
    """

    component: str = "unet"
    numbers: PlanOptions = field(default_factory=PlanOptions)
    budgets: tuple[Budget, ...] = field(default_factory=lambda: parse_budgets([DEFAULT_BUDGET]))
    prompts: str = "everyday"
    counts: tuple[int, int, int] = DEFAULT_COUNTS
    timesteps: int = DEFAULT_TIMESTEPS
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    loras: Mapping[str, float | None] = field(default_factory=dict)
    bins: int = DEFAULT_BINS
    rows: int = DEFAULT_ROWS
    noise_prompts: int = DEFAULT_NOISE_PROMPTS
    solver: Solver = "milp"
    rounds: int = ROUNDS
    times: Path | None = None
    judge: str | None = None
    lpips: Path | None = None
    device: str = "cpu"
    backend: str = "onnxruntime"

    def __post_init__(self) -> None:
        """Check what no other part checks.

        Raises:
            UsageError: a number is out of its range, or there is no such solver.
        """
        check_solver(self.solver)
        if not self.seed >= 0:
            raise UsageError(f"seed: expected 0 or more, got {self.seed}.")
        for name in ("noise_prompts", "rounds", "bins"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name}: expected 1 or more, got {getattr(self, name)}.")
        if not self.rows >= self.bins:
            raise UsageError(f"rows: expected at least {self.bins}, one for each timestep bin, got {self.rows}.")


def counts_for(available: int, wanted: tuple[int, int, int]) -> tuple[int, int, int]:
    """Prompts for each part out of those there are: as many as wanted, or in proportion, and one at least.

    Raises:
        UsageError: a part is to have none, or there are fewer prompts than parts.
    """
    if not min(wanted) >= 1:
        raise UsageError(f"prompts: expected 1 or more for each part, got {', '.join(map(str, wanted))}.")
    if available < LEAST:
        raise UsageError(f"prompts: expected {LEAST} or more, got {available}.")
    if sum(wanted) <= available:
        return wanted
    spare = available - LEAST
    search, verification = (1 + math.floor(spare * count / sum(wanted)) for count in wanted[1:])
    return available - search - verification, search, verification


def captured_by(options: CalibrateOptions, split: PromptSplit, part: Part) -> CaptureOptions:
    """What is captured of a part; of those that noise is measured with, a few prompts."""
    prompts: tuple[str, ...] = getattr(split, part)
    chosen = prompts if part == "calibration" else prompts[: options.noise_prompts]
    return CaptureOptions(
        prompts=chosen, timesteps=options.timesteps, seed=options.seed + _SEEDS[part], **options.settings
    )


def drawn_by(options: CalibrateOptions, split: PromptSplit, part: Part, bundle: Path) -> Drawing:
    """What is drawn of a part.

    A U-Net is seen in a run as it will be, another network by itself.
    """
    return Drawing(
        bundle=bundle,
        prompts=getattr(split, part),
        seed=options.seed + _SEEDS[part],
        settings=options.settings,
        loras=options.loras,
        backend=options.backend,
        component=None if options.component == CALIBRATED[0] else options.component,
    )
