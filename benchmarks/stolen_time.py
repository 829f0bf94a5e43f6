"""Time that a virtual machine's host gave to others while something was measured."""

from __future__ import annotations

from pathlib import Path

# Columns of a processor's line: user, nice, system, idle, iowait, irq, softirq, steal; guests' are in user already.
_COLUMNS, _STEAL = 8, 7


def processor_ticks(stat: Path = Path("/proc/stat")) -> tuple[int, int] | None:
    """Ticks of all processors since the start: stolen, and all; None where the system does not tell (Linux does)."""
    try:
        name, *words = stat.read_text().split("\n", 1)[0].split()
        ticks = [int(word) for word in words[:_COLUMNS]]
    except (OSError, ValueError):
        return None
    return (ticks[_STEAL], sum(ticks)) if name == "cpu" and len(ticks) == _COLUMNS else None


def stolen_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """Share of the processors' time between two looks that others had; None where it is not known."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])
