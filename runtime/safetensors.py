"""Small safetensors files of floats, read and written without another package.

The format is a length, a JSON header, and the data; nothing in it is executed.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .specs import Array

Floats = NDArray[np.float32]
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ALIGNMENT = 8  # of the data behind the header
# What NumPy can shape, whatever zeros are among the sizes.
_RANK_LIMIT, _SIZE_LIMIT = 32, 1 << 59


@dataclass(frozen=True)
class FloatTensor:
    """One tensor of a file; `read` makes it float32."""

    shape: tuple[int, ...]
    read: Callable[[], Floats]


@dataclass(frozen=True)
class FloatTensors:
    """What a file holds; `metadata` is what its writer noted, texts by name."""

    tensors: Mapping[str, FloatTensor]
    metadata: Mapping[str, str]


def open_safetensors(path: Path, content: bytes | memoryview) -> FloatTensors:
    """The tensors of a file. Its values are not looked at.

    Args:
        path: for messages.
        content: the bytes of the file.

    Raises:
        ArtifactError: it is no safetensors file, is damaged, or holds something else than floats.
    """
    tensors: dict[str, FloatTensor] = {}
    try:
        size = int.from_bytes(content[:8], "little")
        data = memoryview(content)[8 + size :]
        header = json.loads(bytes(content[8 : 8 + size]))
        metadata = {str(name): str(text) for name, text in header.pop("__metadata__", {}).items()}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            shape = tuple(int(axis) for axis in entry["shape"])
            dtype = np.dtype(_KINDS[entry["dtype"]])
            if (
                len(shape) > _RANK_LIMIT
                or min(shape, default=0) < 0
                or math.prod(max(1, n) for n in shape) > _SIZE_LIMIT
            ):
                raise ValueError(f"{name} of shape {shape}")
            if not 0 <= start <= stop <= len(data) or math.prod(shape) * dtype.itemsize != stop - start:
                raise ValueError(f"{name} of shape {shape} in bytes {start} to {stop} of {len(data)}")
            tensors[str(name)] = _tensor(data[start:stop], dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as err:
        raise ArtifactError(f"{path}: expected a safetensors file of floats, got {err!r}. Copy it again.") from err
    return FloatTensors(tensors, metadata)


def _tensor(data: memoryview, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> FloatTensor:
    def read() -> Floats:
        value = np.frombuffer(data, dtype=dtype).reshape(shape)
        if dtype == np.uint16:  # bfloat16: the upper half of a float32
            return (value.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return value.astype(np.float32)

    return FloatTensor(shape, read)


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """A file of these tensors, each float32 or float16."""
    names = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in tensors.values())])
