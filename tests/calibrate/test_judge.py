import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from latentrt.calibrate.judge import load_judge, verdicts
from latentrt.runtime.errors import CalibrationError, UsageError
from latentrt.runtime.image import Pictures

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture
def judge_file(tmp_path: Path) -> Path:
    (tmp_path / "judge_neighbour.py").write_text("LEAST = 100\n")
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from judge_neighbour import LEAST\n"
        "@dataclass\n"
        "class Seen:\n"
        "    level: float\n"
        "def bright(prompt, picture):\n"
        "    return prompt == 'light' and Seen(picture.mean()).level >= LEAST\n"
        "def broken(prompt, picture):\n"
        "    raise ValueError('cannot see')\n"
        "def vague(prompt, picture):\n"
        "    return 'yes'\n"
        "number = 3\n"
    )
    return file


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("_judge_", "judge_neighbour")):
            del sys.modules[name]


def grey(*levels: int) -> list[Pictures]:
    return [np.full((4, 4, 3), level, np.uint8) for level in levels]


def test_a_judge_may_import_its_neighbours(judge_file: Path) -> None:
    path = list(sys.path)
    judge = load_judge(f"{judge_file}:bright")
    assert sys.path == path
    assert verdicts(judge, ["light", "light", "dark"], grey(100, 99, 255)) == (True, False, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("judge.py", "expected FILE.py:function"),
        ("judge.txt:shows", "expected FILE.py:function"),
        ("judge.py:", "expected FILE.py:function"),
        ("judge.py:a b", "expected FILE.py:function"),
        ("missing.py:shows", "expected a Python file, found none at missing.py"),
    ],
)
def test_what_names_no_function_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_judge(text)


def test_a_file_without_the_function_is_refused(judge_file: Path) -> None:
    for name in ("dim", "number"):
        with pytest.raises(UsageError, match=f"expected a function {name} in"):
            load_judge(f"{judge_file}:{name}")


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import no_such_module\n")
    with pytest.raises(UsageError, match="ModuleNotFoundError: No module named 'no_such_module'"):
        load_judge(f"{file}:shows")


def test_a_judge_that_fails_or_hedges_is_an_error(judge_file: Path) -> None:
    with pytest.raises(CalibrationError, match="expected a verdict on 'a', got ValueError: cannot see"):
        verdicts(load_judge(f"{judge_file}:broken"), ["a"], grey(0))
    with pytest.raises(CalibrationError, match="expected true or false for 'a', got 'yes'"):
        verdicts(load_judge(f"{judge_file}:vague"), ["a"], grey(0))


def test_the_shapes_judge_reads_prompts_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SHAPES))
    scenes, judge = importlib.import_module("scenes"), importlib.import_module("judge")
    rng = np.random.default_rng(5)
    requests = [scenes.random_prompt(scenes.random_scene(rng), rng, omit=0.5) for _ in range(3000)]
    stating = [request for request in requests if any(getattr(request, name) for name in judge.ATTRIBUTES)]
    assert [judge.request_of(request.prompt) for request in stating] == stating
    with pytest.raises(ValueError, match="expected a shape, colour"):
        judge.request_of("a picture of a shape")


def test_the_shapes_judge_wants_all_that_a_prompt_states() -> None:
    judge = load_judge(f"{SHAPES / 'judge.py'}:shows")
    scenes = sys.modules["scenes"]
    picture = np.asarray(scenes.draw(scenes.Scene("star", "red", "blue", "large", "center")))
    right = ["a star", "a big red star on blue in the middle", "blue background with a huge star"]
    wrong = ["a circle", "a tiny red star on blue", "a red star on a green background", "a red star at the top left"]
    assert verdicts(judge, right + wrong, [picture] * 7) == (True,) * 3 + (False,) * 4
