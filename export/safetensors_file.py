"""Reading safetensors files that may be damaged or hostile, one tensor at a time.

The whole header is held to the format and to the file's size before any tensor is offered, so a tensor that is offered
lies inside the file and is of the size that its shape says. Tensors are read with plain reads, not through a memory
map, whose touched pages would stay in this process's memory.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from latentrt.runtime.errors import ArtifactError

from .weights import Values, Weight, Weights

_HEADER_LIMIT = 100_000_000  # the format's own
_RANK_LIMIT = 32  # of NumPy 1
_SIZE_LIMIT = 2**62  # bytes that NumPy can address, whatever zeros are in the shape
_CHUNK = 1 << 20  # numbers looked at together for NaN
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class _Format:
    """A dtype of the format.

    Attributes:
        non_finite: the bits that are all set in NaN and infinities and in no other number; 0 for integers.
    """

    dtype: np.dtype[Any]
    non_finite: int = 0


_FORMATS = {
    "F64": _Format(np.dtype("<f8"), 0x7FF0 << 48),
    "F32": _Format(np.dtype("<f4"), 0x7F80 << 16),
    "F16": _Format(np.dtype("<f2"), 0x7C00),
    "BF16": _Format(np.dtype(ml_dtypes.bfloat16), 0x7F80),
    "F8_E4M3": _Format(np.dtype(ml_dtypes.float8_e4m3fn), 0x7F),
    "F8_E5M2": _Format(np.dtype(ml_dtypes.float8_e5m2), 0x7C),
    **{f"I{8 * size}": _Format(np.dtype(f"<i{size}")) for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": _Format(np.dtype(f"<u{size}")) for size in (1, 2, 4, 8)},
    "BOOL": _Format(np.dtype(np.bool_)),
}


@dataclass(frozen=True)
class SafetensorsFile:
    """What a safetensors file holds.

    Attributes:
        metadata: what its writer noted; texts by name.
    """

    path: Path
    weights: Weights
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies in the file, counted from its start."""

    name: str
    format: _Format
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read and check a safetensors file's header.

    A tensor's `read` raises ArtifactError too: if the file has changed since, or holds NaN or infinite values.

    Raises:
        ArtifactError: the file is missing, truncated, damaged, a pickle or something else.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            start = file.read(len(_LFS_POINTER))
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" or length > _HEADER_LIMIT:
                _refuse(path, start, size, length)
            if 8 + length > size:
                raise ArtifactError(
                    f"{path}: expected a header of {length} bytes, got a file of {size}. "
                    "It is truncated or damaged: copy it again."
                )
            file.seek(8)
            header = file.read(length)
    except OSError as err:
        raise ArtifactError(f"{path}: expected a safetensors file, got {err.strerror or err}.") from err
    entries, metadata = _entries(path, header)
    spans = [_span(path, name, entry, 8 + length) for name, entry in entries.items()]
    _check_cover(path, spans, 8 + length, size)
    identity = _identity(status)
    return SafetensorsFile(path, {span.name: _weight(path, span, identity) for span in spans}, metadata)


def _refuse(path: Path, start: bytes, size: int, length: int) -> NoReturn:
    """Raise the error that helps best with a file that does not begin as safetensors do."""
    if start.startswith(_PICKLES):
        convert = (
            "import sys, torch, safetensors.torch as s; "
            "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
            "s.save_file({k: v.contiguous().clone() for k, v in w.get('state_dict', w).items() "
            "if hasattr(v, 'contiguous')}, sys.argv[2])"
        )
        target = path.with_name(f"{path.stem}-converted.safetensors")
        command = shlex.join(["python", "-c", convert, str(path), str(target)])
        raise ArtifactError(
            f"{path}: expected a safetensors file, got a pickle, which may run code when it is loaded and is not read. "
            f"Convert it, where it came from a source that you trust:\n{command}"
        )
    if start.startswith(_LFS_POINTER):
        raise ArtifactError(
            f"{path}: expected a safetensors file, got a Git LFS pointer of {size} bytes. "
            "Fetch the file itself: git lfs pull"
        )
    found = f"a header of {length} bytes" if start[8:9] == b"{" else f"{size} bytes of something else"
    raise ArtifactError(
        f"{path}: expected a safetensors file, with a header of at most {_HEADER_LIMIT} bytes, got {found}. "
        "It is truncated or damaged, or of another format: copy it again."
    )


def _damaged(path: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{path}: {what}. The file is truncated or damaged: copy it again.")


def _entries(path: Path, header: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's tensors and its metadata, as JSON gives them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name that comes twice")
        return found

    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as err:
        raise _damaged(path, f"expected a header of JSON, got {err}") from err
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "__metadata__: expected texts by name, got something else")
    return entries, metadata


def _is_sizes(value: Any) -> bool:
    # Exactly int: JSON's true is one to isinstance.
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _span(path: Path, name: str, entry: Any, start: int) -> _Span:
    """One tensor of the header, its size held to its dtype and shape.

    Args:
        start: where the tensors begin in the file.
    """
    if not isinstance(entry, dict):
        raise _damaged(path, f"{name!r}: expected dtype, shape and data_offsets, got {str(entry)[:80]!r}")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise ArtifactError(
            f"{path}: {name!r}: expected a dtype of {', '.join(_FORMATS)}, got {str(kind)[:80]!r}. "
            "Save the file with one of these."
        )
    layout = _FORMATS[kind]
    if not isinstance(shape, list) or not _is_sizes(shape) or len(shape) > _RANK_LIMIT:
        raise _damaged(path, f"{name!r}: expected a shape of at most {_RANK_LIMIT} sizes, got {str(shape)[:80]}")
    if prod(max(size, 1) for size in shape) * layout.dtype.itemsize > _SIZE_LIMIT:
        raise _damaged(path, f"{name!r}: expected a shape that fits in memory, got {str(shape)[:80]}")
    if not isinstance(offsets, list) or not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{name!r}: expected data_offsets of a begin and an end, got {str(offsets)[:80]}")
    size, nbytes = offsets[1] - offsets[0], prod(shape) * layout.dtype.itemsize
    if size != nbytes:
        raise _damaged(path, f"{name!r}: expected {nbytes} bytes for {kind} {shape}, got {size}")
    return _Span(name, layout, tuple(shape), start + offsets[0], start + offsets[1])


def _check_cover(path: Path, spans: list[_Span], start: int, size: int) -> None:
    """Hold the tensors to cover all of the file behind the header, each byte once."""
    end, before = start, "the header"
    for span in sorted(spans, key=lambda span: (span.begin, span.end)):
        if span.begin != end:
            how = "overlaps" if span.begin < end else "leaves a hole behind"
            raise _damaged(path, f"expected tensors one behind the other, got {span.name!r}, which {how} {before}")
        end, before = span.end, repr(span.name)
    if end != size:
        raise _damaged(path, f"expected a file of {end} bytes, as its header says, got {size}")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _weight(path: Path, span: _Span, identity: tuple[int, ...]) -> Weight:
    def read() -> Values:
        values = np.empty(span.shape, span.format.dtype)
        rest = memoryview(values.reshape(-1).view(np.uint8).data)
        try:
            with open(path, "rb", buffering=0) as file:
                if _identity(os.fstat(file.fileno())) != identity:
                    raise ArtifactError(f"{path}: expected the file as it was, got a changed one. Start again.")
                file.seek(span.begin)
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise ArtifactError(f"{path}: expected {span.name!r}, got the file's end. Start again.")
                    rest = rest[count:]
        except OSError as err:
            raise ArtifactError(f"{path}: expected {span.name!r}, got {err.strerror or err}.") from err
        if count := _non_finite(values, span.format):
            raise ArtifactError(
                f"{path}: {span.name!r}: expected finite values, got {count} NaN or infinite of {values.size}. "
                "The training or merge that made the file went wrong: take another one."
            )
        return values

    return Weight(span.shape, span.format.dtype, read)


def _non_finite(values: Values, layout: _Format) -> int:
    """How many values are NaN or infinite."""
    if not layout.non_finite:
        return 0
    bits = values.reshape(-1).view(f"<u{layout.dtype.itemsize}")
    mask = bits.dtype.type(layout.non_finite)
    chunks = (bits[first : first + _CHUNK] for first in range(0, bits.size, _CHUNK))
    return sum(int(np.count_nonzero((chunk & mask) == mask)) for chunk in chunks)
