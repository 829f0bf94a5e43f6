"""A capture: captured prompts in a folder, and `capture.json`, which lists them and says what they were made from.

It is written anew after every prompt, so that what it names exists and is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, CalibrationError
from latentrt.runtime.manifest import changed_inputs, key_of, write_atomic

from .calls import Call
from .captured_prompt import CapturedPrompt, check_prompt, read_prompt
from .source import TEXT_LENGTH

CAPTURE = "capture.json"
VERSION = 1


@dataclass(frozen=True, eq=False)
class Capture:
    """Calls of a network over a set of prompts. Made by `capture.capture`, opened again by `open_capture`.

    Attributes:
        folder: that holds it.
        inputs: what it was made from; `key_of` them is its key.
        files: one for each prompt, in order.
    """

    folder: Path
    inputs: Mapping[str, Any]
    files: tuple[CapturedPrompt, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """That were drawn."""
        return tuple(self.inputs["options"]["prompts"])

    @property
    def key(self) -> str:
        """SHA-256 of what it was made from."""
        return key_of(self.inputs)

    @property
    def count(self) -> int:
        """Calls."""
        return sum(file.calls for file in self.files)

    @property
    def rows(self) -> int:
        """Rows of all calls."""
        return sum(file.rows for file in self.files)

    @property
    def bytes(self) -> int:
        """On disk."""
        return sum(file.size for file in self.files)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not as usual, for people."""
        long = [file.prompt + 1 for file in self.files if file.tokens > TEXT_LENGTH]
        if not long:
            return ()
        note = (
            f"{len(long)} of {len(self.prompts)} prompts, the first of them number {long[0]}, take more than 75 "
            "tokens: they were drawn in chunks, as the runtime draws them"
        )
        return (note,)

    def calls(self) -> Iterator[Call]:
        """The calls, prompt by prompt, in the order of sampling; as often as they are asked for.

        Raises:
            ArtifactError: a file is missing, or was changed since.
        """
        for file in self.files:
            yield from read_prompt(self.folder, file)

    @contextmanager
    def consumed(self) -> Iterator[Iterator[Call]]:
        """The calls, for a consumer that has to take all of them before the end of the `with`.

        Raises:
            CalibrationError: it has taken fewer.
            ArtifactError: as `calls`.
        """
        taken = 0

        def counted() -> Iterator[Call]:
            nonlocal taken
            for call in self.calls():
                taken += 1
                yield call

        yield counted()
        if taken != self.count:
            raise CalibrationError(
                f"{self.folder}: expected all {self.count} captured calls to be consumed, got {taken}. What is missing "
                "would be missing in the ranges too."
            )


def open_capture(folder: Path, inputs: Mapping[str, Any] | None = None) -> Capture:
    """Open a finished capture.

    Args:
        inputs: what it has to be made from, as `capture.capture_inputs` gives them; None for whatever it was.

    Raises:
        ArtifactError: there is none, it is damaged, or not finished.
        CalibrationError: it was made from something else, such as another graph; names what differs.
    """
    held = load_capture(folder)
    if held is None:
        raise ArtifactError(f"{folder}: expected a capture with {CAPTURE}, found none. Capture first.")
    if inputs is not None and (differing := changed_inputs(held.inputs, inputs)):
        raise CalibrationError(
            f"{folder}: expected what this bundle and these options give, got a capture of others: "
            f"{', '.join(differing)} differ. Capture again."
        )
    if len(held.files) < len(held.prompts):
        raise ArtifactError(
            f"{folder}: expected {len(held.prompts)} captured prompts, got {len(held.files)}: the capture was "
            "interrupted. Run it again: it goes on from there."
        )
    for file in held.files:
        check_prompt(folder, file)
    return held


def load_capture(folder: Path) -> Capture | None:
    """What a folder holds of a capture, finished or not; None if it has none. Its files are not looked at.

    Raises:
        ArtifactError: `capture.json` is damaged or of a newer version.
    """
    path = folder / CAPTURE
    try:
        content = json.loads(path.read_bytes())
        if not content["version"] <= VERSION:
            raise ArtifactError(
                f"{path}: expected version {VERSION} or older, got {content['version']}. It was made by a newer "
                "latentrt: upgrade this one."
            )
        files = tuple(CapturedPrompt(**file) for file in content["files"])
        return Capture(folder, content["inputs"], files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ArtifactError(
            f"{path}: expected the list of a capture, got {err!r}. Remove it and capture again."
        ) from err


def save_capture(capture: Capture) -> None:
    """Write `capture.json`.

    Raises:
        OSError: such as for a full disk; the old one stays.
    """
    content = {"version": VERSION, "inputs": capture.inputs, "files": [asdict(file) for file in capture.files]}
    write_atomic(capture.folder / CAPTURE, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
