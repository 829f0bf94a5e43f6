"""What was captured of one prompt, as a safetensors file.

It holds every row once, whoever reads it: guidance feeds the same latents twice, and all calls of a prompt the same
text. Rows are named by their hash; which of them a call was given stands in the metadata, as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import write_atomic
from latentrt.runtime.safetensors import open_safetensors, safetensors_bytes
from latentrt.runtime.specs import Array

from .calls import Call

_TEXT = "encoder_hidden_states"


@dataclass(frozen=True)
class CapturedPrompt:
    """One prompt's file.

    Attributes:
        prompt: its index.
        sha256: of the file.
        size: of the file, in bytes.
        calls: that it holds.
        rows: of all of them.
        tokens: most that a call was told, 77 for each chunk; 0 for networks that are told none.
    """

    prompt: int
    sha256: str
    size: int
    calls: int
    rows: int
    tokens: int

    @property
    def file(self) -> str:
        """Name in the folder."""
        return _name(self.prompt)


def write_prompt(folder: Path, prompt: int, calls: Sequence[Call]) -> CapturedPrompt:
    """Write the calls of a prompt. The same calls give the same bytes.

    Raises:
        OSError: such as for a full disk; nothing is left behind.
    """
    tensors: dict[str, Array] = {}

    def stored(name: str, row: Array) -> str:
        tensor = f"{name}/{hashlib.sha256(f'{row.shape}'.encode() + row.tobytes()).hexdigest()}"
        tensors[tensor] = row
        return tensor

    noted = [
        {
            "timestep": call.timestep,
            "negatives": call.negatives,
            "guidance": call.guidance,
            "feeds": {name: [stored(name, row) for row in values] for name, values in sorted(call.feeds.items())},
        }
        for call in calls
    ]
    data = safetensors_bytes(tensors, {"latentrt": json.dumps({"prompt": prompt, "calls": noted}, sort_keys=True)})
    write_atomic(folder / _name(prompt), data)
    return CapturedPrompt(
        prompt=prompt,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        calls=len(calls),
        rows=sum(call.rows for call in calls),
        tokens=max(call.feeds[_TEXT].shape[1] if _TEXT in call.feeds else 0 for call in calls),
    )


def check_prompt(folder: Path, file: CapturedPrompt) -> None:
    """Compare a prompt's file with what was written.

    Raises:
        ArtifactError: it is missing, or was changed since.
    """
    _content(folder, file)


def read_prompt(folder: Path, file: CapturedPrompt) -> Iterator[Call]:
    """The calls of a prompt, in the order of sampling.

    Raises:
        ArtifactError: the file is missing, or was changed since.
    """
    path = folder / file.file
    held = open_safetensors(path, _content(folder, file))
    rows = {name: tensor.read() for name, tensor in held.tensors.items()}
    for call in json.loads(held.metadata["latentrt"])["calls"]:
        yield Call(
            feeds={name: np.stack([rows[row] for row in own]) for name, own in call["feeds"].items()},
            prompt=file.prompt,
            timestep=call["timestep"],
            negatives=call["negatives"],
            guidance=call["guidance"],
        )


def _name(prompt: int) -> str:
    return f"prompt-{prompt:05d}.safetensors"


def _content(folder: Path, file: CapturedPrompt) -> bytes:
    path = folder / file.file
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path}: expected captured calls, got {err.strerror}. Capture again.") from err
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise ArtifactError(
            f"{path}: expected the {file.size} bytes that were captured, got {len(data)} others. The file was changed "
            "since: capture again, which draws this prompt alone."
        )
    return data
