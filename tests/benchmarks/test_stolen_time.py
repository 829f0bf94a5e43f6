from pathlib import Path

import pytest

from latentrt.benchmarks.stolen_time import processor_ticks, stolen_share


def stat(folder: Path, line: str) -> Path:
    file = folder / "stat"
    file.write_text(f"{line}\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    return file


def test_the_share_is_of_all_time_between_two_looks(tmp_path: Path) -> None:
    before = processor_ticks(stat(tmp_path, "cpu  100 10 20 800 5 1 2 50 0 0"))
    after = processor_ticks(stat(tmp_path, "cpu  150 10 30 820 5 1 2 70 0 0"))
    # 50 user, 10 system, 20 idle, 20 stolen.
    assert stolen_share(before, after) == pytest.approx(0.2)


def test_guests_of_this_machine_count_once(tmp_path: Path) -> None:
    """Linux has their time in `user` too."""
    assert processor_ticks(stat(tmp_path, "cpu  100 0 0 0 0 0 0 0 90 90")) == (0, 100)


@pytest.mark.parametrize("line", ["", "cpu", "cpu  1 2 3 4", "intr 1 2 3 4 5 6 7 8", "cpu  a b c d e f g h"])
def test_what_is_no_such_line_tells_nothing(tmp_path: Path, line: str) -> None:
    assert processor_ticks(stat(tmp_path, line)) is None
    assert processor_ticks(tmp_path / "none") is None


def test_what_is_not_known_has_no_share() -> None:
    assert stolen_share(None, (1, 2)) is None
    assert stolen_share((1, 2), None) is None
    assert stolen_share((1, 2), (1, 2)) is None
