"""Graphics cards by name: memory and multiprocessors. And what CUDA itself takes on them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Gpu

# Bare contexts that users reported: 107 MiB on 34 multiprocessors (RTX 4060 Ti), 256 MiB on 82 (RTX 3090), 555 MiB on
# 188 (RTX PRO 6000); ggml-org/llama.cpp#23604, invoke-ai/InvokeAI#9413. That is 3 MiB each, kernels loaded lazily.
CONTEXT_BYTES_PER_MULTIPROCESSOR = 3 << 20
# What the runtime library and the kernels of an engine take beside its weights; no public figure was found.
LIBRARY_BYTES = 128 << 20
CONTEXT_SOURCE = (
    "assumed, not measured on a GPU: 3 MiB a multiprocessor as in ggml-org/llama.cpp#23604, and 128 MiB for TensorRT "
    "and its kernels"
)
# Where only the memory is known: more than consumer cards of that memory usually have.
_MULTIPROCESSORS_BY_GIB = ((6, 36), (8, 48), (12, 80), (16, 84), (24, 128), (32, 170))
_MOST_MULTIPROCESSORS = 188


@dataclass(frozen=True)
class Card:
    """A device as far as a plan needs it: memory in bytes, multiprocessors, compute capability where known."""

    name: str
    memory: int
    multiprocessors: int
    sm: str | None = None

    @property
    def context_bytes(self) -> int:
        """Memory that CUDA and TensorRT take before any weights: see CONTEXT_SOURCE."""
        return self.multiprocessors * CONTEXT_BYTES_PER_MULTIPROCESSOR + LIBRARY_BYTES


# Name: GiB of the smallest version, multiprocessors, compute capability.
_CARDS: Mapping[str, tuple[int, int, str]] = {
    "RTX 2060": (6, 30, "sm75"),
    "RTX 2070": (8, 36, "sm75"),
    "RTX 2080": (8, 46, "sm75"),
    "RTX 2080 Ti": (11, 68, "sm75"),
    "T4": (15, 40, "sm75"),
    "RTX 3050": (8, 20, "sm86"),
    "RTX 3060": (12, 28, "sm86"),
    "RTX 3060 Ti": (8, 38, "sm86"),
    "RTX 3070": (8, 46, "sm86"),
    "RTX 3070 Ti": (8, 48, "sm86"),
    "RTX 3080": (10, 68, "sm86"),
    "RTX 3080 Ti": (12, 80, "sm86"),
    "RTX 3090": (24, 82, "sm86"),
    "RTX 3090 Ti": (24, 84, "sm86"),
    "RTX A4000": (16, 48, "sm86"),
    "RTX A5000": (24, 64, "sm86"),
    "RTX A6000": (48, 84, "sm86"),
    "A10": (24, 72, "sm86"),
    "A40": (48, 84, "sm86"),
    "A100": (40, 108, "sm80"),
    "RTX 4060": (8, 24, "sm89"),
    "RTX 4060 Ti": (8, 34, "sm89"),
    "RTX 4070": (12, 46, "sm89"),
    "RTX 4070 SUPER": (12, 56, "sm89"),
    "RTX 4070 Ti": (12, 60, "sm89"),
    "RTX 4070 Ti SUPER": (16, 66, "sm89"),
    "RTX 4080": (16, 76, "sm89"),
    "RTX 4080 SUPER": (16, 80, "sm89"),
    "RTX 4090": (24, 128, "sm89"),
    "RTX 6000 Ada": (48, 142, "sm89"),
    "L4": (24, 58, "sm89"),
    "L40S": (48, 142, "sm89"),
    "RTX 5060": (8, 30, "sm120"),
    "RTX 5060 Ti": (8, 36, "sm120"),
    "RTX 5070": (12, 48, "sm120"),
    "RTX 5070 Ti": (16, 70, "sm120"),
    "RTX 5080": (16, 84, "sm120"),
    "RTX 5090": (32, 170, "sm120"),
    "RTX PRO 6000": (96, 188, "sm120"),
    "H100": (80, 132, "sm90"),
    "H200": (139, 132, "sm90"),
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|mib|mb)", re.IGNORECASE)
_VERSION = re.compile(r"(.+?)\s+(\d+)\s*gi?b", re.IGNORECASE)
_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}


def parse_card(text: str) -> Card:
    """A card from `8GB`, `8GiB`, `7800MiB`, `RTX 4060` or `RTX 4060 Ti 16GB` (a version with other memory).

    A bare size counts as written: 8GB is 8·10⁹ bytes, less than a card sold as such has. The size behind a name is
    that of the card's version, in GiB as cards are sold.

    Raises:
        UsageError: neither a size nor the name of a card that is known.
    """
    words = text.strip()
    if size := _SIZE.fullmatch(words):
        memory = int(float(size[1]) * _UNITS[size[2].lower()])
        if not memory >= 1:
            raise UsageError(f"vram: expected a size above zero, got {text!r}.")
        return Card(words, memory, _multiprocessors(memory))
    version = _VERSION.fullmatch(words)
    plain = _key(version[1] if version else words)
    found = next((name for name in _CARDS if _key(name) == plain), None)
    if found is None:
        raise UsageError(
            f"vram: expected a size such as 8GB, or a card such as {', '.join(_near(plain))}, got {text!r}."
        )
    gib, multiprocessors, sm = _CARDS[found]
    name = f"{found} {version[2]}GB" if version else found
    return Card(name, (int(version[2]) if version else gib) << 30, multiprocessors, sm)


def card_of(gpu: Gpu) -> Card:
    """A device of this machine; its multiprocessors from its name where that is known."""
    known = next((card for name, card in _CARDS.items() if _key(name) == _key(gpu.name)), None)
    count = _multiprocessors(gpu.memory_bytes) if known is None else known[1]
    return Card(gpu.name, gpu.memory_bytes, count, gpu.sm)


def sizes_in_trade() -> tuple[Card, ...]:
    """Cards of the memory sizes that are sold, the smallest first, each with as many multiprocessors as are usual."""
    return tuple(
        Card(f"{gib} GiB", gib << 30, _multiprocessors(gib << 30)) for gib in (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
    )


def _key(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def _near(plain: str) -> list[str]:
    names = {_key(name): name for name in _CARDS}
    return [names[key] for key in difflib.get_close_matches(plain, names, n=2, cutoff=0.4)] or ["RTX 4060", "RTX 3090"]


def _multiprocessors(memory: int) -> int:
    return next((count for gib, count in _MULTIPROCESSORS_BY_GIB if memory <= gib << 30), _MOST_MULTIPROCESSORS)
