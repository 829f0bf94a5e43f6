"""The wire format of protobuf: fields of a message, one after the other, without a schema.

Readers raise ValueError or IndexError where the bytes are no message.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message: its number and wire type, where its tag is, where its content is, a varint's value."""

    number: int
    kind: int
    tag: int
    start: int
    stop: int
    value: int = 0


def read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a varint longer than 64 bits")


def fields(data: memoryview, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message in data[start:stop]."""
    position = start
    while position < stop:
        tag = position
        key, position = read_varint(data, position)
        kind, number = key & 7, key >> 3
        value = 0
        begin = position
        if kind == _VARINT:
            value, position = read_varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, begin = read_varint(data, position)
            position = begin + length
        else:
            raise ValueError(f"wire type {kind}")
        if position > stop:
            raise ValueError("a field that ends after its message")
        yield Field(number, kind, tag, begin, position, value)


def varint(value: int) -> bytes:
    """The bytes of a number of at least 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, *parts: bytes | memoryview) -> list[bytes | memoryview]:
    """A length-delimited field."""
    return [varint(number << 3 | _BYTES), varint(sum(len(part) for part in parts)), *parts]


def text_of(data: memoryview, field: Field) -> str:
    """The content of a string field."""
    return str(data[field.start : field.stop], "utf-8")


def packed_varints(data: memoryview, field: Field) -> list[int]:
    """A repeated varint, packed or not."""
    if field.kind == _VARINT:
        return [field.value]
    values, position = [], field.start
    while position < field.stop:
        value, position = read_varint(data, position)
        values.append(value)
    return values
