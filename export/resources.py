"""What an export will need of the disk and the memory, said before it starts."""

from __future__ import annotations

import ctypes
import gc
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.errors import UsageError

from .export_plan import DERIVED
from .graph_files import EXTERNAL_DATA_BYTES

# Components whose weights, where there are many, lie in the file of another's.
_SHARING = {"unet_control": "unet", **DERIVED}
_BYTES = {"fp32": 4, "fp16": 2, "mixed": 2, "bf16": 2}
# The interpreter with PyTorch, diffusers and ONNX Runtime, and the activations of a check.
_BASE_MEMORY = 1.5e9
# Blocks of so many bytes get a mapping of their own, which goes when they are freed; the option's number is glibc's.
_M_MMAP_THRESHOLD, _OWN_MAPPING = -3, 2**20
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Needs:
    """In bytes. Of the memory, the larger part is files that are mapped: with less, an export is slower."""

    disk: int
    memory: int

    def __str__(self) -> str:
        return f"about {self.disk / 1e9:.1f} GB of disk and {self.memory / 1e9:.1f} GB of memory"


def needs_of(graphs: Iterable[tuple[str, str]], parameters: Mapping[str, int]) -> Needs:
    """What exporting these graphs needs.

    Args:
        graphs: component and precision of each.
        parameters: number of weights by component.
    """
    graphs = list(graphs)
    # A graph whose weights are in another's file needs that beside it, made anew or copied.
    files = {
        (_holder(component, _size(component, precision, parameters)), precision) for component, precision in graphs
    }
    largest = max((_size(component, precision, parameters) for component, precision in graphs), default=0)
    disk = sum(_size(component, precision, parameters) for component, precision in files)
    return Needs(disk=disk, memory=int(largest + _BASE_MEMORY))


def _size(component: str, precision: str, parameters: Mapping[str, int]) -> int:
    return parameters[component] * _BYTES[precision]


def _holder(component: str, size: int) -> str:
    """The component whose file has the weights."""
    return _SHARING.get(component, component) if size > EXTERNAL_DATA_BYTES else component


def check_resources(needs: Needs, folder: Path) -> None:
    """Refuse to start what cannot end.

    Args:
        folder: where the files go; it, or the first of its parents that exists, is on the disk that has to hold them.

    Raises:
        UsageError: the disk or the memory is too small.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if not needs.disk <= free:
        raise UsageError(
            f"{folder}: expected {needs.disk / 1e9:.1f} GB of free disk, got {free / 1e9:.1f} GB. "
            "Free some, choose another place with -o, or export one precision."
        )
    memory = available_memory()
    if memory is not None and not needs.memory <= memory:
        raise UsageError(
            f"export: expected {needs.memory / 1e9:.1f} GB of available memory, got {memory / 1e9:.1f} GB. "
            "Close other programs, or export in fp16 only."
        )


def release_memory() -> None:
    """Give memory that is free in this process back to the system, now and from now on, where its allocator can.

    glibc keeps what was freed between blocks in use, and takes ever larger blocks from there: after a reference run and
    a check, a gigabyte.
    """
    gc.collect()
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim") and hasattr(library, "mallopt"):
            library.mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING)
            library.malloc_trim(0)


def available_memory() -> int | None:
    """What the system can give without swapping, in bytes; None where it does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return int(values["MemAvailable"]) * 1024 if "MemAvailable" in values else None
