from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.image import Pictures, save_picture
from latentrt.runtime.picture_metadata import exif_block, read_metadata

TEXT = "a “castle” in 城\nNegative prompt: brume\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 64x48"
RECORD: dict[str, Any] = {"prompt": "a “castle” \udc80", "seed": 2**63, "scale": 7.5, "nested": {"list": [1, None]}}
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".PNG"]


@pytest.fixture
def picture() -> Pictures:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("text", "record"), [(TEXT, RECORD), (TEXT, None), (None, RECORD), (None, None), ("x", {})])
def test_what_is_saved_is_read(
    tmp_path: Path, picture: Pictures, suffix: str, text: str | None, record: dict[str, Any] | None
) -> None:
    path = tmp_path / f"p{suffix}"
    save_picture(path, picture, parameters=text, record=record)
    assert read_metadata(path) == (text, record)


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from([".png", ".webp"]))
def test_every_text_is_read_back(tmp_path_factory: pytest.TempPathFactory, prompt: str, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"text{suffix}"
    text = f"{prompt}\n{TEXT}" * 3
    save_picture(path, np.zeros((1, 1, 3), np.uint8), parameters=text, record={"prompt": prompt})
    assert read_metadata(path) == (text, {"prompt": prompt})


def test_parameters_are_where_a1111_reads_them(tmp_path: Path, picture: Pictures) -> None:
    """A text chunk in PNG; elsewhere the EXIF UserComment: eight bytes of encoding, then UTF-16 big-endian.

    piexif, which A1111 reads with, takes it for a number where its type is not 7 (undefined).
    """
    save_picture(tmp_path / "p.png", picture, parameters=TEXT, record=RECORD)
    with Image.open(tmp_path / "p.png") as png:
        assert png.info["parameters"] == TEXT
        assert json.loads(png.info["latentrt"]) == RECORD
    for suffix in ("jpg", "webp"):
        save_picture(tmp_path / f"p.{suffix}", picture, parameters=TEXT, record=RECORD)
        with Image.open(tmp_path / f"p.{suffix}") as other:
            exif = other.getexif()
            assert exif.get_ifd(0x8769)[0x9286] == b"UNICODE\0" + TEXT.encode("utf-16-be")
            assert exif[0x010E] == "latentrt:" + json.dumps(RECORD, sort_keys=True, separators=(",", ":"))
    entry = struct.pack(">HHI", 0x9286, 7, 8 + len(TEXT.encode("utf-16-be")))
    assert entry in exif_block(TEXT, RECORD)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_equal_input_gives_equal_bytes(tmp_path: Path, picture: Pictures, suffix: str) -> None:
    one, two = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
    save_picture(one, picture, parameters=TEXT, record=RECORD)
    save_picture(two, np.asfortranarray(picture), parameters=TEXT, record=dict(reversed(RECORD.items())))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (b"UNICODE\0" + TEXT.encode("utf-16-be"), TEXT),
        (b"UNICODE\0" + TEXT.encode("utf-16-le"), TEXT),
        (b"UNICODE\0" + TEXT.encode("utf-16"), TEXT),
        (b"ASCII\0\0\0" + b"a castle\0", "a castle"),
        (bytes(8) + TEXT.encode(), TEXT),
        (TEXT.encode(), TEXT),
        (b"", None),
    ],
)
def test_comments_of_other_programs(tmp_path: Path, picture: Pictures, comment: bytes, expected: str | None) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    exif[0x010E] = "a holiday"
    path = tmp_path / "p.jpg"
    Image.fromarray(picture).save(path, exif=exif)
    assert read_metadata(path) == (expected, None)


def test_png_of_a1111(tmp_path: Path, picture: Pictures) -> None:
    info = PngInfo()
    info.add_text("parameters", "caf\xe9, Steps: 1")
    Image.fromarray(picture).save(tmp_path / "p.png", pnginfo=info)
    assert read_metadata(tmp_path / "p.png") == ("caf\xe9, Steps: 1", None)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"p\.png: expected a picture, found no such file"):
        read_metadata(tmp_path / "p.png")


@pytest.mark.parametrize("content", [b"", b"a text", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(20), b"\xff\xd8\xff"])
def test_what_is_no_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"p\.png: expected a"):
        read_metadata(path)
    with pytest.raises(ArtifactError, match="expected a picture"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_truncated_picture(tmp_path: Path, picture: Pictures, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    save_picture(path, picture, parameters=TEXT, record=RECORD)
    content = path.read_bytes()
    # All but the last 20 bytes of a PNG, where checksums and the end mark stand and every pixel is there.
    for cut in (10, 40, 100, 500, len(content) // 2, len(content) - 100, len(content) - 25):
        path.write_bytes(content[:cut])
        with pytest.raises(ArtifactError, match="expected a"):
            read_metadata(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("foreign", ["no json", "[1]", "{", '"text"', "[" * 100_000])
def test_a_record_that_is_no_json_object(tmp_path: Path, picture: Pictures, suffix: str, foreign: str) -> None:
    path = tmp_path / f"p{suffix}"
    info, exif = PngInfo(), Image.Exif()
    info.add_itxt("latentrt", foreign)
    exif[0x010E] = f"latentrt:{foreign}"[:60000]
    options: dict[str, Any] = {"pnginfo": info} if suffix == ".png" else {"exif": exif}
    Image.fromarray(picture).save(path, **options)
    with pytest.raises(ArtifactError, match=r"expected .*JSON.* latentrt record"):
        read_metadata(path)


@pytest.mark.parametrize("record", [{"a": float("nan")}, {"a": object()}, {"a": b"bytes"}])
def test_a_record_that_json_cannot_hold(tmp_path: Path, picture: Pictures, record: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="record: expected an object that JSON can hold"):
        save_picture(tmp_path / "p.png", picture, record=record)
    assert not list(tmp_path.iterdir())


def test_more_metadata_than_a_jpeg_holds(tmp_path: Path, picture: Pictures) -> None:
    long = "a" * 40_000
    with pytest.raises(UsageError, match="at most 65533 bytes of parameters and record in a JPEG"):
        save_picture(tmp_path / "p.jpg", picture, parameters=long)
    for suffix in (".png", ".webp"):
        save_picture(tmp_path / f"p{suffix}", picture, parameters=long, record={"prompt": long})
        assert read_metadata(tmp_path / f"p{suffix}") == (long, {"prompt": long})
