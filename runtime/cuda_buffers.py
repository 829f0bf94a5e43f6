"""Inputs and outputs of one set of shapes: a block of device memory and its page-locked mirror, laid out once."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .cuda_device import Device, allocate
from .errors import BackendError
from .specs import Array, TensorSpec

# TensorRT wants 256 bytes; so much is moved in about the time that a copy takes to start.
_ALIGNMENT, _GAP = 256, 64 << 10


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the block."""

    start: int
    nbytes: int


class TensorBuffers:
    """Device memory for the tensors of an engine at fixed shapes, and a mirror to copy from and to.

    Inputs come first, small ones before large ones: a step's timesteps, latents and whatever small lies between them
    then go up in a single copy, while the text embeddings behind them stay.

    Args:
        inputs: with sizes for all dimensions.
        outputs: likewise.
        purpose: for the message when there is no room.

    Raises:
        OutOfDeviceMemory: there is no room on the device, or in page-locked memory; nothing is held then.
    """

    def __init__(
        self, device: Device, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec], *, purpose: str
    ) -> None:
        self._device = device
        self._inputs = sorted(inputs, key=_nbytes)
        self._outputs = tuple(outputs)
        self._slots: dict[str, _Slot] = {}
        end = 0
        for spec in (*self._inputs, *self._outputs):
            self._slots[spec.name] = _Slot(end, _nbytes(spec))
            end += -(-max(_nbytes(spec), 1) // _ALIGNMENT) * _ALIGNMENT
        self._nbytes = end
        self._block = allocate(device, end, purpose)
        try:
            self._mirror = device.malloc_host(end)
        except BackendError:
            device.free(self._block)
            raise
        memory = np.ctypeslib.as_array(ctypes.cast(self._mirror, ctypes.POINTER(ctypes.c_uint8)), (end,))
        memory[:] = 0
        self._views: dict[str, Array] = {
            spec.name: memory[slot.start : slot.start + slot.nbytes].view(spec.dtype).reshape(_sizes(spec))
            for spec in (*self._inputs, *self._outputs)
            for slot in (self._slots[spec.name],)
        }

    @property
    def nbytes(self) -> int:
        """Size of the block."""
        return self._nbytes

    @property
    def addresses(self) -> Mapping[str, int]:
        """Where each tensor is on the device; the same for as long as this lives."""
        return {name: self._block + slot.start for name, slot in self._slots.items()}

    def write(self, name: str, value: Array) -> None:
        """Put an input's values into the mirror. The stream must have taken the ones before."""
        self._views[name][...] = value

    def upload(self, names: Collection[str], stream: int) -> None:
        """Copy inputs from the mirror to the device: neighbours in one copy, with what little lies between them."""
        start = stop = -1
        for slot in (self._slots[spec.name] for spec in self._inputs if spec.name in names):
            if start >= 0 and slot.start - stop > _GAP:
                self._copy_up(start, stop, stream)
                start = slot.start
            start, stop = (slot.start if start < 0 else start), slot.start + slot.nbytes
        if start >= 0:
            self._copy_up(start, stop, stream)

    def download(self, stream: int) -> None:
        """Copy all outputs from the device to the mirror, in one copy."""
        first, last = self._slots[self._outputs[0].name], self._slots[self._outputs[-1].name]
        stop = last.start + last.nbytes
        self._device.copy_to_host(self._mirror + first.start, self._block + first.start, stop - first.start, stream)

    def read(self) -> dict[str, Array]:
        """The outputs in the mirror, in arrays of their own. The stream must have been synchronized."""
        return {spec.name: self._views[spec.name].copy() for spec in self._outputs}

    def free(self) -> None:
        """Give all of it back. The stream must have been synchronized."""
        self._views.clear()
        self._device.free(self._block)
        self._device.free_host(self._mirror)

    def _copy_up(self, start: int, stop: int, stream: int) -> None:
        self._device.copy_to_device(self._block + start, self._mirror + start, stop - start, stream)


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape)


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(_sizes(spec)) * np.dtype(spec.dtype).itemsize
