"""The wire format, against the protobuf package on ONNX's messages."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from latentrt.runtime.protobuf import fields, message, packed_varints, text_of, varint

NAME, DIMS, RAW = 8, 1, 9


@given(st.lists(st.integers(0, 2**63 - 1)), st.text(), st.binary())
def test_what_protobuf_writes_is_read(dims: list[int], name: str, raw: bytes) -> None:
    data = memoryview(TensorProto(dims=dims, name=name, raw_data=raw, data_type=1).SerializeToString())
    found = list(fields(data, 0, len(data)))
    assert [value for field in found if field.number == DIMS for value in packed_varints(data, field)] == dims
    assert [text_of(data, field) for field in found if field.number == NAME] == [name]
    assert [bytes(data[field.start : field.stop]) for field in found if field.number == RAW] == [raw]
    assert b"".join(bytes(data[field.tag : field.stop]) for field in found) == bytes(data)


@given(st.lists(st.integers(0, 2**63 - 1)), st.text(), st.binary())
def test_what_is_written_protobuf_reads(dims: list[int], name: str, raw: bytes) -> None:
    parts = [varint(DIMS << 3) + varint(size) for size in dims]
    packed = b"".join(varint(size) for size in dims)
    for written in (b"".join(parts), b"".join(message(DIMS, packed))):
        data = b"".join([written, *message(NAME, name.encode()), *message(RAW, raw[:1], raw[1:])])
        assert TensorProto.FromString(data) == TensorProto(dims=dims, name=name, raw_data=raw)
        first = [field for field in fields(memoryview(data), 0, len(data)) if field.number == DIMS]
        assert [value for field in first for value in packed_varints(memoryview(data), field)] == dims


@given(st.binary())
def test_other_bytes_are_no_message(data: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError):
        for field in fields(memoryview(data), 0, len(data)):
            assert 0 <= field.tag <= field.start <= field.stop <= len(data)
