"""What a picture file says about how it was made: the web UIs' `parameters` text and latentrt's JSON record.

In a PNG both are iTXt chunks, `parameters` and `latentrt`. JPEG and WebP have no text chunks: `parameters` is the EXIF
UserComment in UTF-16 big-endian, as A1111 writes and reads it, and the record is the EXIF ImageDescription, prefixed
`latentrt:`. ImageDescription is in the first directory of every EXIF reader since TIFF 6.0 and is ASCII, which JSON
can be; an editor that keeps the one keeps the other. XMP, the other choice, is a second block that editors write anew.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Exif
    from PIL.Image import Image as PilImage
    from PIL.PngImagePlugin import PngInfo

RECORD = "latentrt"
PARAMETERS = "parameters"
_IMAGE_DESCRIPTION, _EXIF_DIRECTORY, _USER_COMMENT = 0x010E, 0x8769, 0x9286
_ASCII_TYPE, _LONG_TYPE, _UNDEFINED_TYPE = 2, 4, 7
_SIZES = {_ASCII_TYPE: 1, _LONG_TYPE: 4, _UNDEFINED_TYPE: 1}
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


class PictureMetadata(NamedTuple):
    """The `parameters` text and the record of a picture; None for what it does not have."""

    parameters: str | None
    record: dict[str, Any] | None


def text_chunks(parameters: str | None, record: Mapping[str, Any] | None) -> PngInfo:
    """The text chunks of a PNG.

    Raises:
        UsageError: the record is no JSON object.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if parameters:
        info.add_itxt(PARAMETERS, _encodable(parameters))
    if record is not None:
        info.add_itxt(RECORD, _dump(record))
    return info


def exif_block(parameters: str | None, record: Mapping[str, Any] | None) -> bytes:
    """The EXIF block of a JPEG or WebP; empty where there is nothing to say.

    Raises:
        UsageError: the record is no JSON object.
    """
    # Written here and not by Pillow, which gives UserComment the type BYTE: piexif, and so A1111, then fails on it.
    # Offsets count from the byte order mark; the directory of the comment comes first, so that its offset is known, and
    # is of even length, UTF-16 being even, so that the other begins at an even offset as TIFF wants.
    nested, entries = b"", []
    if record is not None:
        entries.append((_IMAGE_DESCRIPTION, _ASCII_TYPE, f"{RECORD}:{_dump(record)}\0".encode("ascii")))
    if parameters:
        comment = _UNICODE + _encodable(parameters).encode("utf-16-be")
        nested = _directory(8, [(_USER_COMMENT, _UNDEFINED_TYPE, comment)])
        entries.append((_EXIF_DIRECTORY, _LONG_TYPE, struct.pack(">I", 8)))
    if not entries:
        return b""
    start = 8 + len(nested)
    return b"Exif\0\0MM\0*" + struct.pack(">I", start) + nested + _directory(start, entries)


def _directory(start: int, entries: Sequence[tuple[int, int, bytes]]) -> bytes:
    """A TIFF directory at offset `start`: a count, twelve bytes an entry, no successor, the data that did not fit."""
    at = start + 2 + 12 * len(entries) + 4
    head, data = struct.pack(">H", len(entries)), b""
    for tag, kind, value in entries:
        inline = len(value) <= 4
        place = value.ljust(4, b"\0") if inline else struct.pack(">I", at + len(data))
        head += struct.pack(">HHI", tag, kind, len(value) // _SIZES[kind]) + place
        data += b"" if inline else value
    return head + bytes(4) + data


def read_metadata(path: Path) -> PictureMetadata:
    """The `parameters` text and the record of a PNG, JPEG or WebP, whoever wrote it.

    Raises:
        ArtifactError: the file is missing, is no such picture, is truncated or damaged, or its record is not JSON.
    """
    picture = read_picture(path)
    text = picture.info.get(PARAMETERS)
    record = picture.info.get(RECORD)
    if text is None or record is None:
        exif = _exif_of(path, picture)
        comment = exif.get_ifd(_EXIF_DIRECTORY).get(_USER_COMMENT)
        if text is None and comment:
            text = _comment_text(comment)
        note = exif.get(_IMAGE_DESCRIPTION)
        if record is None and isinstance(note, str) and note.startswith(f"{RECORD}:"):
            record = note.removeprefix(f"{RECORD}:")
    return PictureMetadata(str(text) if text else None, None if record is None else _load(path, record))


def read_picture(path: Path, *, formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")) -> PilImage:
    """A picture file with all its pixels and metadata in memory.

    Args:
        formats: Pillow's names of those that are tried. All of them would be too many: some run other programs.

    Raises:
        ArtifactError: the file is missing, is no such picture, or is truncated or damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=formats) as picture:
            # Text may stand after the pixels, and only reading them shows that the file is whole.
            picture.load()
            return picture
    except FileNotFoundError as err:
        raise ArtifactError(f"{path}: expected a picture, found no such file.") from err
    except (UnidentifiedImageError, IsADirectoryError) as err:
        raise ArtifactError(f"{path}: expected a picture ({', '.join(formats)}), got something else.") from err
    except Exception as err:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more for damaged files.
        raise ArtifactError(f"{path}: expected a whole picture, got a truncated or damaged one: {err}.") from err


def _exif_of(path: Path, picture: PilImage) -> Exif:
    try:
        exif = picture.getexif()
        exif.get_ifd(_EXIF_DIRECTORY)
    except Exception as err:
        raise ArtifactError(f"{path}: expected readable EXIF data, got {err}.") from err
    return exif


def _encodable(text: str) -> str:
    """Text without lone surrogates, which an undecodable command line argument leaves and no encoding holds."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _comment_text(comment: bytes | str) -> str:
    """The text of a UserComment: eight bytes that name the encoding, then the text."""
    if isinstance(comment, str):
        return comment
    prefix, body = comment[:8], comment[8:]
    if prefix == _UNICODE:
        # The standard leaves the byte order open. Most letters of a settings line have a zero as their high byte.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace").removeprefix("\ufeff")
    if prefix in (_ASCII, bytes(8)):
        return body.decode("utf-8", "replace").rstrip("\0")
    return comment.decode("utf-8", "replace").rstrip("\0")


def _dump(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as err:
        raise UsageError(f"record: expected an object that JSON can hold, got {err}.") from err


def _load(path: Path, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{path}: expected JSON in its {RECORD} record, got {err}.") from err
    if not isinstance(record, dict):
        raise ArtifactError(f"{path}: expected a JSON object in its {RECORD} record, got {type(record).__name__}.")
    return record
