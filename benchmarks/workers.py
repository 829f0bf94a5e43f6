"""Subjects, each open in a process of its own: the side that asks. `worker_loop` is the side that answers.

So every subject's memory is its own, and no module of one is in the process of another.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from latentrt.runtime import errors
from latentrt.runtime.errors import BackendError

from .cases import Model, Settings, Subject
from .results_file import Memory, Vram
from .worker_process import WorkerProcess, meaning_of

LOOP = Path(__file__).with_name("worker_loop.py")
OUR_HANDLERS = "latentrt.benchmarks.latentrt_handlers"
# Of `Opened`, what a run may change: all of them, or none.
_STATE = ("backend", "on_gpu", "precisions", "notes")
# Seconds that a process has to end by itself.
_GRACE = 10.0


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a system said when it was loaded.

    Attributes:
        imports: seconds for its modules.
        load: seconds for the model.
        backend: what runs it, for people.
        on_gpu: whether that is a GPU.
        precisions: by component; of peers `{"all": …}`.
        notes: what is not as it was asked for.
        packages: versions, by distribution.
        rss: resident bytes of its process.
    """

    imports: float
    load: float
    backend: str
    on_gpu: bool
    precisions: Mapping[str, str]
    notes: tuple[str, ...]
    packages: Mapping[str, str]
    rss: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A run: as `results_file.Run`, whose fields are documented there, without its turn.

    Attributes:
        peak_rss: resident bytes of the process, at the highest so far.
        clock: seconds that the clock of the stages itself took; None where the system does not tell.
    """

    seconds: float
    stages: Mapping[str, float]
    calls: tuple[float, ...]
    gpu_calls: tuple[float, ...] | None
    peak_rss: int
    clock: float | None = None


class Worker:
    """A process with a subject open; `open_worker` makes it. One request at a time."""

    def __init__(self, label: str, process: WorkerProcess, *, timeout: float) -> None:
        self._label, self._process, self._timeout = label, process, timeout
        self._requests = 0
        self._opened: Opened | None = None

    @property
    def opened(self) -> Opened:
        """What it said when it was loaded, and of what runs it, its precisions and notes, after the latest run.

        A network that is opened when it is first needed, or a size that no engine holds, shows then.
        """
        assert self._opened is not None
        return self._opened

    @property
    def seconds_since_start(self) -> float:
        """Since just before its process was started."""
        return self._process.seconds_since_start

    def run(
        self,
        settings: Settings | Mapping[str, Any],
        prompts: Sequence[str],
        seed: int,
        *,
        keep: Path | None = None,
        timed: bool = True,
    ) -> Drawn:
        """Draw once, one picture for each prompt, with consecutive seeds.

        Args:
            settings: of peers with what `peers.peer_settings` adds.
            keep: a file for `images` (n, h, w, 3) uint8 and `trajectory` (steps, n, c, h/8, w/8) float32; such a run
                is no sample.
            timed: with stages and calls. Without, nothing but the whole is timed.

        Raises:
            BackendError: the system failed, or its process died or took too long; says what, with the end of its
                stderr.
        """
        answer = self._ask(
            "run",
            settings=asdict(settings) if isinstance(settings, Settings) else dict(settings),
            prompts=list(prompts),
            seed=seed,
            timed=timed,
            keep=None if keep is None else str(keep),
        )
        state = {name: answer[name] for name in _STATE if name in answer}
        if state:
            self._opened = replace(self.opened, **{**state, "notes": tuple(state["notes"])})
        gpu = answer.get("gpu_calls")
        return Drawn(
            seconds=answer["seconds"],
            stages=answer.get("stages", {}),
            calls=tuple(answer.get("calls", ())),
            gpu_calls=None if gpu is None else tuple(gpu),
            peak_rss=answer["peak_rss"],
            clock=answer.get("clock"),
        )

    def memory(self) -> Memory:
        """Of its process, until now.

        Raises:
            BackendError: as `run`.
        """
        answer = self._ask("memory")
        return Memory(rss_loaded=self.opened.rss, peak_rss=answer["peak_rss"], vram=Vram(**answer["vram"]))

    def _open(self, subject: Subject, model: Model) -> None:
        answer = self._ask("open", subject=asdict(subject), model=asdict(model))
        fields = {name: answer[name] for name in Opened.__dataclass_fields__}
        self._opened = Opened(**{**fields, "notes": tuple(fields["notes"])})

    def _ask(self, what: str, **details: Any) -> dict[str, Any]:
        self._requests += 1
        self._process.send(json.dumps({"do": what, "id": self._requests, **details}))
        answer = self._answer(what)
        if "error" not in answer:
            return answer
        if hasattr(errors, answer["kind"]):
            raise BackendError(f"{self._label}: {answer['error']}")
        raise BackendError(f"{self._label}: {answer['kind']}: {answer['error']}{self._process.last_words()}")

    def _answer(self, what: str) -> dict[str, Any]:
        until = time.monotonic() + self._timeout
        while True:
            try:
                line = self._process.receive(until)
            except TimeoutError:
                self._process.end()
                raise BackendError(
                    f"{self._label}: expected an answer to {what!r} within {self._timeout:g} s, got none; its process "
                    f"was ended.{self._process.last_words()}"
                ) from None
            if line is None:
                code = self._process.end()
                raise BackendError(
                    f"{self._label}: expected an answer to {what!r}, its process ended with {meaning_of(code)}."
                    f"{self._process.last_words()}"
                )
            # Anything else was printed before the loop had taken stdout for itself, or is an answer that nobody
            # waited for.
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.get("id") == self._requests:
                    return answer


@contextmanager
def open_worker(
    subject: Subject,
    model: Model,
    *,
    python: str | None = None,
    handlers: str = OUR_HANDLERS,
    timeout: float = 3600,
) -> Iterator[Worker]:
    """A process with a subject open, for as long as the block runs.

    Args:
        python: interpreter; default this one.
        handlers: of the system, see `worker_loop`.
        timeout: seconds for each answer.

    Raises:
        BackendError: the system could not be loaded, or its process died or took too long; says what, with the end of
            its stderr.
    """
    python = python or sys.executable
    with tempfile.TemporaryDirectory(prefix="latentrt-bench-", ignore_cleanup_errors=True) as folder:
        try:
            command = [python, str(LOOP), handlers]
            process = WorkerProcess(command, Path(folder) / "stderr", threads=model.threads)
        except OSError as err:
            raise BackendError(f"{subject.label}: expected a Python interpreter, got {python}: {err}.") from err
        worker = Worker(subject.label, process, timeout=timeout)
        grace = 0.0
        try:
            worker._open(subject, model)
            yield worker
            grace = _GRACE
        finally:
            process.end(grace=grace)
