"""The parent's side of a worker, against systems of a few lines in real processes that fail in every way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.cases import Model, Settings, Subject
from latentrt.benchmarks.results_file import Vram
from latentrt.benchmarks.workers import Worker, open_worker
from latentrt.runtime.errors import BackendError

SUBJECT = Subject(system="latentrt", precision="fp32", backend="onnxruntime", width=64, height=64, batch=1)
SETTINGS = Settings(sampler="Euler", schedule=None, steps=3, guidance=5.0)
HANDLERS = """
import os, signal, subprocess, sys, time
import threading

OPENED = {{"imports": 0.5, "load": 1.5, "backend": "a test", "on_gpu": False, "precisions": {{"unet": "fp32"}},
          "notes": ["slow"], "packages": {{"numpy": "2"}}}}

def open_subject(subject, model):
    held = bytearray(1 << 20)
    {opening}
    def run(request):
        {running}
        return {{"seconds": 2.0, "stages": {{"unet": 1.5}}, "calls": [1.0, 0.5], "gpu_calls": None, "echo": request}}
    return OPENED, {{"run": run, "memory": lambda request: {{"vram": {{"weights": 5, "reason": None}}}}}}
"""


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Any]:
    """`open_worker` for a system that does something of its own when it is opened, or when it draws."""

    def opens(opening: str = "pass", running: str = "pass", threads: int = 0, timeout: float = 30) -> Any:
        path = tmp_path / "system.py"
        path.write_text(HANDLERS.format(opening=opening, running=running))
        return open_worker(SUBJECT, Model(bundle="b", threads=threads), handlers=str(path), timeout=timeout)

    return opens


def draw(worker: Worker, **settings: Any) -> Any:
    return worker.run(SETTINGS, ["a", "b"], 7, **settings)


def is_running(pid: int) -> bool:
    """Whether a process is there that has not ended: a child of nobody that waits for its parent has."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def pid_of(worker: Worker) -> int:
    return worker._process.pid


def test_what_a_system_says_arrives(opened: Callable[..., Any]) -> None:
    with opened() as worker:
        assert worker.opened.imports >= 0.5, "with the time that its module took"
        assert (worker.opened.load, worker.opened.backend, worker.opened.notes) == (1.5, "a test", ("slow",))
        assert worker.opened.precisions == {"unet": "fp32"}
        run = draw(worker)
        assert (run.seconds, run.stages, run.calls, run.gpu_calls) == (2.0, {"unet": 1.5}, (1.0, 0.5), None)
        memory = worker.memory()
        assert memory.vram == Vram(weights=5)
        assert memory.rss_loaded == worker.opened.rss
        assert 1 << 20 < memory.rss_loaded <= run.peak_rss <= memory.peak_rss


def test_the_peak_is_of_the_process_and_not_of_the_one_that_started_it(opened: Callable[..., Any]) -> None:
    """`getrusage` counts what the parent had when it forked."""
    ours = b"x" * (256 << 20)
    with opened() as worker:
        assert worker.memory().peak_rss < len(ours) / 2


def test_a_request_arrives_whole(opened: Callable[..., Any], tmp_path: Path) -> None:
    kept = f"open({str(tmp_path / 'request')!r}, 'w').write(repr(request))"
    with opened(running=kept) as worker:
        worker.run(SETTINGS, ["ein Bär\n", "b"], 7, keep=tmp_path / "k.npz", timed=False)
    found = eval((tmp_path / "request").read_text())
    assert found["prompts"] == ["ein Bär\n", "b"]
    assert (found["seed"], found["timed"], found["keep"]) == (7, False, str(tmp_path / "k.npz"))
    assert found["settings"] == {
        "sampler": "Euler", "schedule": None, "steps": 3, "guidance": 5.0, "guidance_interval": [0.0, 1.0],
    }  # fmt: skip


@pytest.mark.parametrize("threads", [0, 3])
def test_threads_are_told_before_the_process_starts(
    opened: Callable[..., Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    says = "OPENED['notes'] = [repr({k: v for k, v in os.environ.items() if k.endswith('_NUM_THREADS')})]"
    with opened(opening=says, threads=threads) as worker:
        assert worker.opened.notes == (repr({"OMP_NUM_THREADS": "3"} if threads else {}),)


def test_what_libraries_print_disturbs_nothing(opened: Callable[..., Any]) -> None:
    forged = r"""os.write(1, b'\n{"id": 2, "seconds": 9, "peak_rss": 9}\n')"""
    noise = f"{forged}; print('loading 100 %', end='', flush=True)"
    with opened(opening=noise, running=noise + "; input_ = sys.stdin.read()") as worker:
        assert [draw(worker).seconds, draw(worker).seconds] == [2.0, 2.0]


def test_what_was_printed_before_the_loop_began_disturbs_nothing(
    opened: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'welcome')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with opened(timeout=10) as worker:
        assert draw(worker).seconds == 2.0


def test_modules_of_the_benchmarks_hide_no_others(opened: Callable[..., Any], tmp_path: Path) -> None:
    # `results.py` and `cases.py` lie beside the loop, which is run by its path.
    with opened(opening="OPENED['notes'] = [n for n in ('results', 'cases') if __import__('importlib.util').util."
                "find_spec(n)]") as worker:  # fmt: skip
        assert worker.opened.notes == ()


def test_an_exception_is_told_and_the_next_run_goes_on(opened: Callable[..., Any]) -> None:
    with opened(running="if request['seed'] == 1: raise KeyError('no such sampler')") as worker:
        with pytest.raises(BackendError, match=r"latentrt fp32, onnxruntime: KeyError: 'no such sampler'.*\n.*Trace"):
            worker.run(SETTINGS, ["a"], 1)
        assert draw(worker).seconds == 2.0


def test_errors_on_purpose_speak_for_themselves(opened: Callable[..., Any]) -> None:
    raises = "raise type('ArtifactError', (Exception,), {})('unet: expected a file, found none.')"
    with pytest.raises(BackendError) as caught, opened(opening=raises):
        pass
    assert str(caught.value) == "latentrt fp32, onnxruntime: unet: expected a file, found none."


def test_answers_that_are_no_json_are_an_error(opened: Callable[..., Any]) -> None:
    with opened(running="return {'seconds': 1j}") as worker, pytest.raises(BackendError, match=r"TypeError.*complex"):
        draw(worker)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"ended with SIGKILL \(.*memory"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
        ("os._exit(3)", "ended with exit code 3"),
        ("sys.exit(4)", "ended with exit code 4"),
    ],
)
def test_a_process_that_dies(opened: Callable[..., Any], end: str, how: str) -> None:
    dies = f"print('out of ' + 'luck', file=sys.stderr, flush=True); {end}"
    with opened(running=dies) as worker:
        for _ in range(2):
            with pytest.raises(BackendError, match=rf"answer to 'run', its process {how}[\s\S]*\nout of luck$"):
                draw(worker)
    with pytest.raises(BackendError, match=f"answer to 'open', its process {how}"), opened(opening=dies):
        pass


def test_a_process_that_ends_between_two_requests(opened: Callable[..., Any]) -> None:
    with opened() as worker:
        os.kill(pid_of(worker), signal.SIGKILL)
        with pytest.raises(BackendError, match=r"ended with SIGKILL.* It wrote nothing to stderr"):
            draw(worker)


def test_a_process_that_hangs_is_ended(opened: Callable[..., Any]) -> None:
    with opened(running="print('still', file=sys.stderr, flush=True); time.sleep(60)", timeout=1.0) as worker:
        pid = pid_of(worker)
        with pytest.raises(BackendError, match=r"'run' within 1 s, got none; its process was ended.*\nstill"):
            draw(worker)
        assert not is_running(pid)
        with pytest.raises(BackendError):
            draw(worker)


def test_a_long_stderr_is_quoted_at_its_end(opened: Callable[..., Any]) -> None:
    floods = "print('x' * 300000, 'the end', file=sys.stderr, flush=True); os._exit(1)"
    with opened(running=floods) as worker, pytest.raises(BackendError) as caught:
        draw(worker)
    assert str(caught.value).endswith("xxx the end")
    assert len(str(caught.value)) < 2000


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match=r"expected a Python interpreter, got /nowhere/python: .*No such file"),
        open_worker(SUBJECT, Model(bundle="b"), python="/nowhere/python"),
    ):
        pass


@pytest.fixture
def family(tmp_path: Path) -> Iterator[str]:
    """What starts a process that nobody ends, and writes its number down."""
    note = tmp_path / "child"
    starts = f"child = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w').write(str(child.pid))"
    yield starts
    child = int(note.read_text())
    until = time.monotonic() + 5
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(child)


def test_nothing_is_left_after_the_block(opened: Callable[..., Any], family: str) -> None:
    with opened(running=family) as worker:
        pid = pid_of(worker)
        draw(worker)
    assert not is_running(pid)


def test_nothing_is_left_after_an_error(opened: Callable[..., Any], family: str) -> None:
    pids = []

    def fails() -> None:
        with opened(running=family) as worker:
            pids.append(pid_of(worker))
            draw(worker)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not is_running(pids[0])


def test_nothing_is_left_after_ctrl_c(opened: Callable[..., Any], family: str) -> None:
    pids, began = [], time.monotonic()

    def waits() -> None:
        with opened(running=family + "; time.sleep(60)") as worker:
            pids.append(pid_of(worker))
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            draw(worker)

    with pytest.raises(KeyboardInterrupt):
        waits()
    assert not is_running(pids[0])
    assert time.monotonic() - began < 30, "it is not waited for"


def test_an_answer_that_was_not_waited_for_is_not_the_next(opened: Callable[..., Any]) -> None:
    slow = "if request['seed'] == 1: time.sleep(0.8); return {'seconds': 1.0}"
    with opened(running=slow) as worker:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            worker.run(SETTINGS, ["a"], 1)
        assert draw(worker).seconds == 2.0


def test_the_process_sees_the_end_of_its_parent(opened: Callable[..., Any]) -> None:
    with opened() as worker:
        process = worker._process._process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(5) == 0


def test_time_counts_from_the_start_of_the_process(opened: Callable[..., Any]) -> None:
    before = time.perf_counter()
    with opened(opening="time.sleep(0.3)") as worker:
        inside = worker.seconds_since_start
        assert 0.3 < inside < time.perf_counter() - before
