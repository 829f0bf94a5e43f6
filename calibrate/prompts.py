"""Prompts to calibrate with: the project's own sets, or a file with one a line; and how they are shared out.

A prompt of more than 75 tokens is drawn as the runtime draws it, in chunks. Only what cannot be a prompt is refused.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from latentrt.runtime.errors import UsageError

# Name -> file beside this one.
BUILT_IN = {"everyday": "everyday_prompts.txt", "shapes": "shapes_prompts.txt"}
# One each to calibrate with, to search with and to verify with.
LEAST = 3
# More than eight chunks of 75 tokens of ordinary English. A longer line is text of another kind.
MOST_CHARACTERS = 3000
# The runtime's grammar draws the two sides of this word as prompts of their own.
_AND = re.compile(r"\bAND\b")


@dataclass(frozen=True)
class PromptSplit:
    """Three sets of prompts that share none.

    Attributes:
        calibration: that ranges are taken from.
        search: that the mix of precisions is chosen with.
        verification: held out: that only the result is judged by.
    """

    calibration: tuple[str, ...]
    search: tuple[str, ...]
    verification: tuple[str, ...]


def load_prompts(name: str | Path) -> tuple[str, ...]:
    """The prompts of a built-in set or of a file: each once, in their order.

    Args:
        name: everyday, shapes, or the path of a UTF-8 text file with a prompt a line. Empty lines and lines that begin
            with # are skipped; a prompt that was there before is, too.

    Raises:
        UsageError: there is no such file, it is no UTF-8 text, a line is too long or joins prompts by AND, or fewer
            than LEAST prompts are left.
    """
    if str(name) in BUILT_IN:
        text = resources.files(__package__).joinpath(BUILT_IN[str(name)]).read_text("utf-8")
    else:
        text = _text_of(Path(name))
    lines = enumerate((line.strip() for line in text.splitlines()), 1)
    prompts = [
        checked_prompt(line, f"{name}, line {number}") for number, line in lines if line and not line.startswith("#")
    ]
    distinct = tuple(dict.fromkeys(prompts))
    if len(distinct) < LEAST:
        raise UsageError(
            f"{name}: expected {LEAST} or more different prompts, one a line, got {len(distinct)}. "
            f"Some are to calibrate with and others to check the result: give 64 or more, or {' or '.join(BUILT_IN)}."
        )
    return distinct


def split_prompts(prompts: Sequence[str], seed: int, counts: tuple[int, int, int]) -> PromptSplit:
    """Share prompts out, at random and always the same way.

    The held-out ones depend on the seed and their own number alone, so that results with more or fewer prompts to
    calibrate with are compared on the same ones.

    Args:
        prompts: all different.
        seed: of the choice.
        counts: to calibrate, to search and to verify with.

    Raises:
        UsageError: there are not as many, a count is below 1, or a prompt is there twice.
    """
    if len(set(prompts)) != len(prompts):
        raise UsageError(
            f"prompts: expected each once, got {len(prompts) - len(set(prompts))} again. Remove the repetitions."
        )
    if not min(counts) >= 1:
        raise UsageError(f"prompts: expected 1 or more for each part, got {counts}.")
    if not sum(counts) <= len(prompts):
        raise UsageError(
            f"prompts: expected {sum(counts)} different ones ({counts[0]} to calibrate, {counts[1]} to search and "
            f"{counts[2]} to verify with), got {len(prompts)}. Give more, or use fewer for a part."
        )
    order = [prompts[index] for index in np.random.default_rng(seed).permutation(len(prompts))]
    calibration, search, verification = counts
    return PromptSplit(
        calibration=tuple(order[verification + search :][:calibration]),
        search=tuple(order[verification:][:search]),
        verification=tuple(order[:verification]),
    )


def checked_prompt(prompt: str, where: str) -> str:
    """A prompt, if it can be drawn as one.

    Args:
        where: it stands, for the message.

    Raises:
        UsageError: it is too long, holds control characters, or joins prompts by AND.
    """
    if not len(prompt) <= MOST_CHARACTERS:
        raise UsageError(
            f"{where}: expected at most {MOST_CHARACTERS} characters, got {len(prompt)}. Put every prompt on a line of "
            "its own."
        )
    if _AND.search(prompt):
        raise UsageError(
            f"{where}: expected one prompt, got several joined by AND, whose rows guidance combines in another way. "
            "Write them on lines of their own, or the word in small letters."
        )
    if any(unicodedata.category(character) == "Cc" and character != "\t" for character in prompt):
        raise UsageError(f"{where}: expected text, got control characters. Give a plain text file.")
    return prompt


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except OSError as err:
        raise UsageError(
            f"{path}: expected a file of prompts, one a line, or one of the sets {', '.join(BUILT_IN)}, got "
            f"{err.strerror}."
        ) from err
    except UnicodeDecodeError as err:
        raise UsageError(
            f"{path}: expected UTF-8 text, got a byte that is none at {err.start}. Save it as UTF-8."
        ) from err
