"""The reader against the safetensors package as the oracle, and against files made to harm it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.export.safetensors_file import read_safetensors
from latentrt.runtime.errors import ArtifactError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NUMPY = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with a header as given (JSON, or bytes as they are) and any length said of it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 0, 2), (2, 3, 4)])
def test_values_are_those_of_the_safetensors_package(path: Path, name: str, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(DTYPES[name])
    other = torch.arange(5)
    safetensors.torch.save_file({"a": values, "b.c": other}, path)
    weights = read_safetensors(path).weights
    expected = safetensors.torch.load_file(path)
    assert weights.keys() == expected.keys()
    weight = weights["a"]
    read = weight.read()
    assert weight.shape == read.shape == shape
    assert weight.dtype == read.dtype == np.dtype(NUMPY.get(name) or values.numpy().dtype)
    assert read.tobytes() == bits(expected["a"]) == bits(values)
    assert weights["b.c"].read().tolist() == other.tolist()


def test_metadata_is_read(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"modelspec.prediction_type": "v"})
    assert read_safetensors(path).metadata == {"modelspec.prediction_type": "v"}


def test_a_file_without_tensors_is_empty(path: Path) -> None:
    assert read_safetensors(write(path, {})).weights == {}


def test_reading_one_tensor_allocates_that_tensor_alone(path: Path) -> None:
    tensors = {f"w{number}": torch.ones(1 << 20) for number in range(4)}
    safetensors.torch.save_file(tensors, path)
    tracemalloc.start()
    weights = read_safetensors(path).weights
    opened = tracemalloc.get_traced_memory()[1]
    for weight in weights.values():
        weight.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 200_000
    # The tensor, and the few megabytes in which its chunks are looked at for NaN.
    assert peak < 3 * 4 * (1 << 20)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("position", [0, 2_000_000, -1])
def test_nan_and_infinity_are_errors_that_name_the_tensor(path: Path, name: str, value: str, position: int) -> None:
    if name == "F8_E4M3" and "inf" in value:
        pytest.skip("this format has no infinity")
    sign = -1.0 if value.startswith("-") else 1.0
    values = torch.ones(2_100_000).to(DTYPES[name])
    values[position] = torch.copysign(torch.tensor(float(value.lstrip("-"))), torch.tensor(sign)).to(DTYPES[name])
    safetensors.torch.save_file({"fine": torch.ones(2), "unet.bad": values}, path)
    weights = read_safetensors(path).weights
    assert weights["fine"].read().tolist() == [1, 1]
    with pytest.raises(ArtifactError, match=r"'unet\.bad': expected finite values, got 1 NaN or infinite of 2100000"):
        weights["unet.bad"].read()


@pytest.mark.parametrize("name", FLOATS)
def test_the_largest_finite_values_are_fine(path: Path, name: str) -> None:
    limits = torch.finfo(DTYPES[name])
    values = torch.tensor([limits.max, limits.min, limits.tiny, 0.0], dtype=torch.float64).to(DTYPES[name])
    safetensors.torch.save_file({"a": values}, path)
    assert read_safetensors(path).weights["a"].read().tobytes() == bits(values)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty file": (lambda p: p.write_bytes(b""), "got 0 bytes of something else"),
    "fewer bytes than a length": (lambda p: p.write_bytes(b"\x08\0\0"), "got 3 bytes of something else"),
    "a header beyond the file": (lambda p: write(p, {}, length=500), "header of 500 bytes, got a file of 10"),
    "a header above the limit": (lambda p: write(p, {}, length=100_000_001), "at most 100000000 bytes"),
    "a header of 2**64 - 1": (lambda p: write(p, {}, length=2**64 - 1), "at most 100000000 bytes"),
    "no object": (lambda p: write(p, b"[]"), "something else"),
    "broken JSON": (lambda p: write(p, b'{"a": '), "header of JSON"),
    "no UTF-8": (lambda p: write(p, b'{"\xff": 1}'), "header of JSON"),
    "deeply nested": (lambda p: write(p, b'{"a":' + b"[" * 200_000), "header of JSON"),
    "a number of 10000 digits": (lambda p: write(p, b'{"a":' + b"9" * 10_000 + b"}"), "header of JSON"),
    "a name twice": (lambda p: write(p, b'{"a":{},"a":{}}'), "a name that comes twice"),
    "a key twice": (
        lambda p: write(p, b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "a name that comes twice",
    ),
    "an entry that is none": (lambda p: write(p, {"a": 5}), "'a': expected dtype, shape and data_offsets"),
    "nothing said": (lambda p: write(p, {"a": {}}), "'a': expected a dtype"),
    "metadata that are no texts": (lambda p: write(p, {"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that are a list": (lambda p: write(p, {"__metadata__": []}), "__metadata__"),
    "an unknown dtype": (lambda p: write(p, {"a": entry(0, 4, dtype="F4")}, bytes(4)), "dtype of F64.*got 'F4'"),
    "a dtype that is a list": (lambda p: write(p, {"a": {**entry(0, 4), "dtype": []}}, bytes(4)), "expected a dtype"),
    "a negative size": (lambda p: write(p, {"a": entry(0, 4, [-1])}, bytes(4)), "expected a shape"),
    "a size that is a float": (lambda p: write(p, {"a": entry(0, 4, [1.0])}, bytes(4)), "expected a shape"),  # type: ignore[list-item]
    "a size that is true": (lambda p: write(p, {"a": entry(0, 4, [True])}, bytes(4)), "expected a shape"),
    "a shape of 33 axes": (lambda p: write(p, {"a": entry(0, 4, [1] * 33)}, bytes(4)), "at most 32"),
    "a shape that overflows": (lambda p: write(p, {"a": entry(0, 0, [2**32, 2**32])}), "fits in memory"),
    "a huge axis beside a zero": (lambda p: write(p, {"a": entry(0, 0, [2**62, 2**62, 0])}), "fits in memory"),
    "a shape for more bytes": (lambda p: write(p, {"a": entry(0, 4, [2])}, bytes(4)), "8 bytes for F32 .*got 4"),
    "a shape for fewer bytes": (lambda p: write(p, {"a": entry(0, 8, [1])}, bytes(8)), "4 bytes for F32 .*got 8"),
    "negative offsets": (lambda p: write(p, {"a": entry(-4, 0, [1])}, bytes(4)), "begin and an end"),
    "reversed offsets": (lambda p: write(p, {"a": entry(4, 0, [1])}, bytes(4)), "begin and an end"),
    "three offsets": (lambda p: write(p, {"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, bytes(8)), "begin and an"),
    "overlapping tensors": (
        lambda p: write(p, {"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "'b', which overlaps 'a'",
    ),
    "the same bytes twice": (lambda p: write(p, {"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlaps 'a'"),
    "a hole at the start": (lambda p: write(p, {"a": entry(4, 8)}, bytes(8)), "leaves a hole behind the header"),
    "a hole between": (
        lambda p: write(p, {"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
        "'b', which leaves a hole behind 'a'",
    ),
    "out of the file": (lambda p: write(p, {"a": entry(0, 4000)}, bytes(8)), r"expected a file of \d+ bytes"),
    "bytes left over": (lambda p: write(p, {"a": entry(0, 4)}, bytes(5)), r"expected a file of \d+ bytes"),
    "an unprintable name": (lambda p: write(p, b'{"\\ud800": 5}'), r"'\\ud800'"),
    "a Git LFS pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "git lfs pull",
    ),
    "a folder": (lambda p: p.mkdir(), "expected a safetensors file"),
    "nothing": (lambda p: None, "No such file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_one_clear_error(path: Path, what: str) -> None:
    make, said = HOSTILE[what]
    make(path)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_its_name_with_a_command_that_converts_it(
    tmp_path: Path, suffix: str, zipped: bool
) -> None:
    path = tmp_path / f"a model{suffix}"
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"state_dict": {"a": shared.T, "b": shared}, "epoch": 3}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtifactError, match="got a pickle") as caught:
        read_safetensors(path)
    command = shlex.split(str(caught.value).splitlines()[-1])
    assert command[0] == "python"
    if suffix == ".ckpt":
        subprocess.run([sys.executable, *command[1:]], check=True, timeout=120)
        weights = read_safetensors(tmp_path / "a model-converted.safetensors").weights
        assert {name: weight.read().tolist() for name, weight in weights.items()} == {
            "a": shared.T.tolist(),
            "b": shared.tolist(),
        }


def test_a_safetensors_file_of_another_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    assert read_safetensors(path).weights["a"].read().tolist() == [1, 1]


@pytest.mark.parametrize("change", ["longer", "other", "gone"])
def test_a_file_that_changes_after_it_was_opened_is_not_read(path: Path, change: str) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    weight = read_safetensors(path).weights["a"]
    if change == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    elif change == "other":
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        os.replace(copy, path)
    else:
        path.unlink()
    with pytest.raises(ArtifactError):
        weight.read()


def outcome(path: Path) -> Mapping[str, Any] | None:
    """What the reader makes of a file: shapes and bytes by name, or None for its error."""
    try:
        weights = read_safetensors(path).weights
        return {name: (weight.shape, weight.read().tobytes()) for name, weight in weights.items()}
    except ArtifactError:
        return None


def oracle(path: Path) -> Mapping[str, Any] | None:
    """What the safetensors package makes of it."""
    try:
        return {
            name: (tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        }
    except safetensors.SafetensorError:
        return None


def whole_file(path: Path) -> bytes:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "unet.a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(4, generator=generator).half(),
        "c": torch.arange(3),
    }
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_fuzzed_bytes_give_right_values_or_the_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzz.safetensors"
    raw = bytearray(whole_file(path))
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of what can go wrong is in the header.
        position = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.sampled_from(b'0123456789",:[]{}-. \\eF') | st.integers(0, 255))
    cut = data.draw(st.just(len(raw)) | st.integers(0, len(raw)))
    path.write_bytes(bytes(raw[:cut]))
    found = outcome(path)
    if found is not None:
        assert found == oracle(path)


NUMBERS = st.integers(-2, 40) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, True, 1.0, None, "4"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", None, 3]),
        "shape": st.lists(NUMBERS, max_size=4) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
        "more": NUMBERS,
    },
)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES, max_size=4) | st.lists(NUMBERS),
    size=st.integers(0, 200),
)
def test_fuzzed_headers_give_right_values_or_the_error(tmp_path: Path, header: Any, size: int) -> None:
    path = write(tmp_path / "fuzz.safetensors", header, bytes(size))
    found = outcome(path)
    if found is not None:
        assert found == oracle(path)


@FUZZ
@given(sizes=st.lists(st.integers(0, 5), max_size=5), order=st.randoms(use_true_random=False))
def test_tensors_in_any_order_of_the_header_are_read(tmp_path: Path, sizes: list[int], order: Any) -> None:
    path = tmp_path / "fuzz.safetensors"
    ends = np.cumsum([4 * size for size in sizes]).tolist()
    entries = [(f"w{n}", entry(end - 4 * size, end)) for n, (size, end) in enumerate(zip(sizes, ends, strict=True))]
    order.shuffle(entries)
    values = np.arange(sum(sizes), dtype=np.float32)
    write(path, dict(entries), values.tobytes())
    found = outcome(path)
    assert found is not None
    assert found == oracle(path)
