"""Whether there is memory for systems beside each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeAlias

from latentrt.runtime.machine import memory_bytes, probe_machine
from latentrt.runtime.vram import open_nvml

from .results_file import Memory

# Of the whole memory: for what else runs, and what is not foreseen.
_MARGIN = 0.05

# (free, total) bytes; raises OSError where it is not known.
Free: TypeAlias = Callable[[], tuple[int, int]]


def has_room(loaded: Sequence[Memory], *, another: bool, ram: Free = memory_bytes, vram: Free | None = None) -> bool:
    """Whether systems that are loaded have room beside each other, by what was measured of them.

    One at a time draws, so there has to be room for one rise from the loaded state to the peak. Another system is taken
    to need as much as the largest so far. Where a machine does not say what is free, there is taken to be room.

    Args:
        loaded: of each that is loaded and has drawn, one or more.
        another: whether one more is to be loaded.
        ram: what is free.
        vram: likewise on the GPU, asked where any of the loaded ones uses one; default NVML.
    """
    rises = [each.peak_rss if another else each.peak_rss - each.rss_loaded for each in loaded]
    peaks = [each.vram.peak for each in loaded if each.vram.peak is not None]
    on_gpu = max(peaks) if another and peaks else 0
    return _fits(max(rises), ram) and (not peaks or _fits(on_gpu, vram or free_vram))


def free_vram() -> tuple[int, int]:
    """Free and total memory of the first GPU, in bytes.

    Raises:
        OSError: there is none, or NVML does not say.
    """
    usage = open_nvml()
    total = probe_machine().gpus[0].memory_bytes
    return total - usage()[1], total


def _fits(nbytes: int, look: Free) -> bool:
    with contextlib.suppress(OSError):
        free, total = look()
        return nbytes + _MARGIN * total <= free
    return True
