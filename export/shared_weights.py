"""A graph whose large weights lie in the external data of another one in the same folder.

The U-Net that takes ControlNet residuals is the U-Net with a few inputs more: its gigabytes need not lie there twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from .to_onnx import save_onnx

# Below, a weight stays in the graph's own file.
_LEAST_BYTES = 1024


def save_sharing(model: ir.Model, path: Path, holder: Path) -> tuple[Path, ...]:
    """Write a graph, with those weights that equal some of `holder`'s external data as references to it.

    Where the other graph has no external data, or little of the weights is found there, the graph is written whole.

    Returns:
        The files that the graph consists of, the shared one included.
    """
    found = {_identity(tensor): tensor for tensor in _external_tensors(ir.load(holder))}
    shared = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _LEAST_BYTES and (match := found.get(_identity(tensor))):
            shared[name] = match
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if sum(tensor.nbytes for tensor in shared.values()) < 0.9 * total:
        return save_onnx(model, path)
    for name, match in shared.items():
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            match.location,
            match.offset,
            match.length,
            match.dtype,
            shape=match.shape,
            name=name,
            base_dir=path.parent,
        )
    ir.save(model, path)
    return (path, *sorted({path.with_name(str(match.location)) for match in shared.values()}))


def files_of(path: Path) -> list[Path]:
    """The .onnx file and the files that its weights lie in."""
    return [path, *sorted({path.with_name(str(tensor.location)) for tensor in _external_tensors(ir.load(path))})]


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _identity(tensor: ir.TensorProtocol) -> tuple[str, str, str]:
    """What two tensors of the same content have in common."""
    return str(tensor.dtype), str(list(tensor.shape)), hashlib.sha256(tensor.tobytes()).hexdigest()
