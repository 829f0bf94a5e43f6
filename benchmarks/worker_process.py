"""A process that answers lines with lines, started, read with a time limit, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

# Of OpenMP, and of libraries that put their own before it.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Characters of its stderr that a message ends with.
_QUOTED = 1500


class WorkerProcess:
    """A process with pipes. It is this side's to `end`.

    Args:
        command: with its arguments.
        said: file for its stderr.
        threads: of the processor that it may use; 0 for all.

    Raises:
        OSError: there is no such program.
    """

    def __init__(self, command: Sequence[str], said: Path, *, threads: int) -> None:
        self._said = said
        environment = {name: value for name, value in os.environ.items() if name not in _THREADS}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with said.open("wb") as stderr:
            self._started = time.perf_counter()
            # A session of its own: what it starts can be ended with it, and Ctrl-C reaches this process alone, which
            # ends it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="latentrt-worker", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def seconds_since_start(self) -> float:
        """Since just before it was started."""
        return time.perf_counter() - self._started

    def send(self, line: str) -> None:
        """Write a line. If it is gone, `receive` tells."""
        with contextlib.suppress(OSError, ValueError):
            self._stdin.write(line + "\n")
            self._stdin.flush()

    def receive(self, until: float) -> str | None:
        """A line that it wrote; None once it has ended.

        Args:
            until: when to give up, by `time.monotonic`.

        Raises:
            TimeoutError: it wrote none until then.
        """
        try:
            line = self._lines.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            raise TimeoutError from None
        if line:
            return line
        self._lines.put("")
        return None

    def last_words(self) -> str:
        """The end of its stderr, as a message quotes it."""
        text = self._said.read_bytes().decode(errors="replace").strip()
        return f" The end of its stderr:\n{text[-_QUOTED:]}" if text else " It wrote nothing to stderr."

    def end(self, *, grace: float = 0.0) -> int:
        """End it and all that it started, once it had so many seconds to finish by itself.

        Returns:
            Its exit code, negative for a signal.
        """
        try:
            with contextlib.suppress(OSError):
                self._stdin.close()
            self._reader.join(grace)
        finally:
            self._kill()
            code = self._process.wait()
        self._reader.join(1)
        if not self._reader.is_alive():
            self._stdout.close()
        return code

    def _kill(self) -> None:
        # Its number is taken until it was waited for, even if it has ended; after that it may be another's.
        if self._process.returncode is not None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._stdout:
                self._lines.put(line)
        self._lines.put("")


def meaning_of(code: int) -> str:
    """An exit code for people."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (the system does so when memory runs out)" if name == "SIGKILL" else name
