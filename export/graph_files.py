"""Writing graphs: weights go to disk one at a time, and graphs of one network can share them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import onnx_ir as ir

from latentrt.runtime.errors import LatentrtError

# One file is easier to handle, but protobuf stops at 2 GB and reads the whole file to see the graph.
EXTERNAL_DATA_BYTES = 100 * 2**20
# Below, a weight stays in the graph's own file.
_LEAST_BYTES = 1024
# Of every weight in the file: a cache line, so that mapped weights can be used where they lie.
_ALIGNMENT = 64
# Weights that are read and converted beside the one that is written; NumPy does it outside of Python's lock.
_AHEAD = min(4, os.cpu_count() or 1)
# Of the weights, what has to be in another graph's file for it to be worth while.
_SHARE = 0.9


def save_onnx(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a graph; weights of more than EXTERNAL_DATA_BYTES in all go to `<path>_data` beside it.

    They are written in the graph's order, a few being read ahead. Afterwards the model refers to the file.

    Returns:
        The files written, the graph first.

    Raises:
        OSError: the disk is full, or the like.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if weight_bytes(model) <= EXTERNAL_DATA_BYTES:
        _save(model, path)
        return (path,)
    data = path.with_name(path.name + "_data")
    large = [
        (value, value.const_value)
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _LEAST_BYTES
    ]
    with data.open("wb") as stream:
        for (value, tensor), content in zip(large, _contents(tensor for _, tensor in large), strict=True):
            stream.write(bytes(-stream.tell() % _ALIGNMENT))
            offset = stream.tell()
            stream.write(content)
            value.const_value = _reference(path, data.name, offset, tensor)
    _save(model, path)
    return (path, data)


def _contents(tensors: Iterable[ir.TensorProtocol]) -> Iterator[bytes]:
    """The bytes of tensors in order; those of the next few are made meanwhile."""
    pending = iter(tensors)
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="weights") as pool:
        ahead = deque(pool.submit(tensor.tobytes) for tensor in islice(pending, _AHEAD))
        try:
            while ahead:
                content = ahead.popleft().result()
                ahead.extend(pool.submit(tensor.tobytes) for tensor in islice(pending, 1))
                yield content
                del content
        finally:
            for future in ahead:
                future.cancel()


def save_sharing(model: ir.Model, path: Path, holder: Path) -> tuple[Path, ...]:
    """Write a graph, with references to those of `holder`'s external weights that it has too.

    Where the other graph has no external data, or little of the weights is found there, the graph is written whole.

    Args:
        holder: a graph in the same folder, of the same network.

    Returns:
        The files that the graph consists of, the shared one included.
    """
    held = {str(tensor.name): tensor for tensor in external_tensors(ir.load(holder))}
    shared = {
        name: held[name]
        for name, value in model.graph.initializers.items()
        if name in held and value.const_value is not None and _equal(value.const_value, held[name])
    }
    if sum(tensor.nbytes for tensor in shared.values()) < _SHARE * weight_bytes(model):
        return save_onnx(model, path)
    for name, tensor in shared.items():
        model.graph.initializers[name].const_value = _reference(path, str(tensor.location), tensor.offset or 0, tensor)
    _save(model, path)
    return tuple(files_of(path))


def _save(model: ir.Model, path: Path) -> None:
    """onnx-ir's `save`, with an error of ours that a weight raised when it was read as it was."""
    try:
        ir.save(model, path)
    except Exception as err:
        cause: BaseException | None = err
        while cause is not None and not isinstance(cause, LatentrtError):
            cause = cause.__cause__
        raise (cause or err) from None


def files_of(path: Path) -> list[Path]:
    """The .onnx file and the files that its weights lie in."""
    return [path, *sorted({path.with_name(str(tensor.location)) for tensor in external_tensors(ir.load(path))})]


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The weights that lie in other files."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def weight_bytes(model: ir.Model) -> int:
    """Size of all weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _reference(path: Path, location: str, offset: int, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(tensor.name),
        base_dir=path.parent,
    )


def _equal(ours: ir.TensorProtocol, theirs: ir.ExternalTensor) -> bool:
    """Whether two weights are the same, bit for bit. What was mapped to find out is let go."""
    if ours.dtype != theirs.dtype or tuple(ours.shape.numpy()) != tuple(theirs.shape.numpy()):
        return False
    try:
        return ours.tobytes() == theirs.tobytes()
    finally:
        theirs.release()
