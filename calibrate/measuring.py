"""Measured plans, each once: what was measured is kept beside the plan, whatever budget it was measured for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.manifest import key_of, sha256_of, write_atomic

from .budget import Budget
from .calibration_options import drawn_by
from .judge import load_judge
from .picture_metrics import BUILT_IN
from .planning import plan_items, selected
from .preparing import Prepared, Progress, Say, network_on
from .search import Choice, Trial, search
from .solver import solve
from .trial import Bench, measure_plan


@dataclass(frozen=True, eq=False)
class Measuring:
    """A bench and the file of what was measured on it."""

    prepared: Prepared
    bench: Bench
    file: Path
    say: Say
    progress: Progress

    def search(self, budgets: Sequence[Budget], *, limit: float = math.inf) -> tuple[Trial, ...]:
        """The plans that were measured until one meets the budgets, as `search.search`."""
        options, plan = self.prepared.options, self.prepared.plan
        items = plan_items(plan, self.prepared.layers)
        return search(
            lambda noise: solve(items, noise, solver=options.solver),
            budgets,
            lambda choice: self.values(choice, budgets),
            rounds=options.rounds,
            limit=limit,
        )

    def values(self, choice: Choice, budgets: Sequence[Budget]) -> Mapping[str, float]:
        """The values of a choice, measured or known."""
        known = _read(self.file)
        key = hashlib.sha256("\n".join(sorted(choice.chosen)).encode()).hexdigest()
        found: dict[str, float] = known.get(key, {})
        if not {budget.metric for budget in budgets} <= found.keys():
            quants = selected(self.prepared.plan, choice.chosen).quants()
            found |= measure_plan(
                self.bench,
                quants,
                budgets,
                on_progress=lambda what, done, total: self.progress(what, done / max(total, 1)),
            )
            known = {**_read(self.file), key: found}
            write_atomic(self.file, json.dumps(known, indent=1).encode())
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.items()))
        size = f"{len(choice.chosen)} layers, {choice.gain:.1%} of the cost"
        self.say(f"trial: {size}, {choice.predicted_db:.1f} dB predicted: {figures}")
        return found


@contextmanager
def measuring(prepared: Prepared, *, say: Say, on_progress: Progress) -> Iterator[Measuring]:
    """What plans of a prepared network are measured with: calls and pictures of the search's prompts.

    Raises: as `prepare`.
    """
    options, source = prepared.options, prepared.source
    drawing = drawn_by(options, prepared.split, "search", source.bundle.path)
    metrics = dict(BUILT_IN)
    if options.lpips is not None:
        from .lpips import open_lpips

        metrics["lpips"] = open_lpips(options.lpips)
    means: dict[str, Any] = {
        "capture": prepared.search.key,
        "pictures": drawing.key("fp32"),
        "judge": None if options.judge is None else sha256_of(Path(options.judge.rpartition(":")[0])),
        "lpips": None if options.lpips is None else sha256_of(options.lpips),
    }
    name = key_of(means)[:16]
    with network_on(source, options.device) as network:
        bench = Bench(
            source=source,
            network=network,
            device=options.device,
            calls=tuple(prepared.search.calls()),
            drawing=drawing,
            folder=prepared.stage.folder / f"pictures-{name}",
            metrics=metrics,
            judge=None if options.judge is None else load_judge(options.judge),
        )
        yield Measuring(prepared, bench, prepared.stage.folder / f"trials-{name}.json", say, on_progress)


def _read(path: Path) -> dict[str, dict[str, float]]:
    """What was measured before; nothing where that cannot be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
