from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.worker_loop import answers_to, load_handlers, resident_bytes

STATUS = """Name:\tpython
VmPeak:\t  900000 kB
VmHWM:\t    2048 kB
VmRSS:\t    1024 kB
Threads:\t3
"""


def test_linux_tells_the_programs_own_memory(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    assert resident_bytes(tmp_path / "status") == (1 << 20, 2 << 20)


def test_elsewhere_the_highest_stands_for_both(tmp_path: Path) -> None:
    now, highest = resident_bytes(tmp_path / "none")
    assert now == highest
    # In bytes, whatever the unit of getrusage: as much as /proc says, which leaves out what was forked from.
    assert highest >= resident_bytes()[1] - (1 << 20)
    assert highest < 1 << 40


def test_handlers_are_a_module_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a_system.py"
    path.write_text("from dataclasses import dataclass\n@dataclass\nclass Made:\n    value: 'int' = 3\n")
    assert load_handlers(str(path)).Made().value == 3
    assert load_handlers("json.decoder").JSONDecodeError is json.JSONDecodeError
    with pytest.raises(FileNotFoundError):
        load_handlers(str(tmp_path / "none.py"))


def test_requests_are_answered_in_turn_until_it_is_to_quit(tmp_path: Path) -> None:
    path = tmp_path / "sums.py"
    path.write_text(
        "def open_subject(subject, model):\n"
        "    return {'imports': 1.0, 'both': subject + model}, {'run': lambda r: {'twice': 2 * r['number']}}\n"
    )

    def ask(identity: int, **request: Any) -> str:
        return json.dumps({"id": identity, **request})

    requests = iter(
        [
            ask(1, do="run", number=1),
            ask(2, do="open", subject="a", model="b"),
            ask(3, do="run", number=21),
            ask(4, do="memory"),
            ask(5, do="quit"),
            ask(6, do="run", number=3),
        ]
    )
    early, opened, run, unknown, quits = answers_to(requests, str(path))
    assert early == {"id": 1, "error": "'run'", "kind": "KeyError"}
    assert (opened["id"], opened["both"]) == (2, "ab")
    assert 1 < opened["imports"] < 2
    assert (run["id"], run["twice"]) == (3, 42)
    assert run["peak_rss"] >= opened["rss"] > 1 << 20
    assert unknown == {"id": 4, "error": "'memory'", "kind": "KeyError"}
    assert quits == {"id": 5}
