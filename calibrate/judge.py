"""Judges: the user's own function that says whether a picture shows what its prompt asks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from latentrt.runtime.errors import CalibrationError, UsageError
from latentrt.runtime.image import Pictures

if TYPE_CHECKING:
    from collections.abc import Iterator

Judge: TypeAlias = Callable[[str, Pictures], bool]


def load_judge(text: str) -> Judge:
    """The function of a Python file, such as `judge.py:shows`; it is run, with all that the file does on import.

    The function is given a prompt and a picture (h, w, 3) uint8 and returns whether the one shows the other. The file
    may import its neighbours, as a script may.

    Raises:
        UsageError: the text is not FILE.py:function, there is no such file or function, or the file fails.
    """
    name, colon, function = text.rpartition(":")
    path = Path(name)
    if not colon or path.suffix != ".py" or not function.isidentifier():
        raise UsageError(f"judge: expected FILE.py:function, got {text!r}.")
    if not path.is_file():
        raise UsageError(f"judge: expected a Python file, found none at {path}.")
    spec = importlib.util.spec_from_file_location(f"_judge_{path.stem}", path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their own module up.
    sys.modules[spec.name] = module
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as err:
        raise UsageError(f"judge: expected {path} to be imported, got {type(err).__name__}: {err}") from err
    judge = getattr(module, function, None)
    if not callable(judge):
        raise UsageError(f"judge: expected a function {function} in {path}, found none.")
    return judge  # type: ignore[no-any-return]  # what the user's function returns is checked when it does


def verdicts(judge: Judge, prompts: Sequence[str], pictures: Iterable[Pictures]) -> tuple[bool, ...]:
    """Whether each picture shows its prompt.

    Raises:
        CalibrationError: the judge raised, or returned something else than true or false.
    """
    found = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        try:
            verdict = judge(prompt, picture)
        except Exception as err:
            raise CalibrationError(f"judge: expected a verdict on {prompt!r}, got {type(err).__name__}: {err}") from err
        if not isinstance(verdict, (bool, np.bool_)):
            raise CalibrationError(f"judge: expected true or false for {prompt!r}, got {verdict!r}.")
        found.append(bool(verdict))
    return tuple(found)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
