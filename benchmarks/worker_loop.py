"""The process of a subject: opens one system and draws with it, as JSON lines on stdin ask for.

    PYTHON worker_loop.py HANDLERS

HANDLERS is a module's name or a .py file, with a function `open_subject(subject, model)`: from Subject and Model, as
dicts, to the answer to `open`, and functions for the other requests by their names, `run` and `memory`, each from the
request to its answer. What they answer is JSON; the loop adds what any process can say of itself:

    open     imports, in seconds, with the import of HANDLERS; rss, resident bytes after it
    run, memory  peak_rss, resident bytes at the highest

A request is answered by one line with its `id`; an exception by {"error": message, "kind": its class}, with the
traceback on stderr. `quit`, and the end of stdin, end the process.

It runs under interpreters that do not have latentrt, so it needs the standard library only and is run by its path.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

Handler = Callable[[Mapping[str, Any]], dict[str, Any]]


def resident_bytes(status: Path = Path("/proc/self/status")) -> tuple[int, int]:
    """Bytes of this process in memory: now, and at the highest since it began.

    Linux counts the highest for the program alone; `getrusage` counts there what the parent had when it forked, too.
    Elsewhere only the highest is known and stands for both.
    """
    if status.exists():
        sizes = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
        return int(sizes["VmRSS"].split()[0]) * 1024, int(sizes["VmHWM"].split()[0]) * 1024
    import resource

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    highest *= 1 if sys.platform == "darwin" else 1024
    return highest, highest


def load_handlers(name: str) -> ModuleType:
    """The module of a name, or of a .py file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}: expected a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def answers_to(requests: Iterator[str], handlers: str) -> Iterator[dict[str, Any]]:
    """The answer to each request, until it is to quit."""
    commands: Mapping[str, Handler] = {}

    def opened(request: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal commands
        began = time.perf_counter()
        module = load_handlers(handlers)
        imports = time.perf_counter() - began
        answer, commands = module.open_subject(request["subject"], request["model"])
        return {**answer, "imports": imports + answer["imports"], "rss": resident_bytes()[0]}

    for line in requests:
        request = json.loads(line)
        what, number = request["do"], request["id"]
        if what == "quit":
            yield {"id": number}
            return
        try:
            answer = opened(request) if what == "open" else {**commands[what](request), "peak_rss": resident_bytes()[1]}
            json.dumps(answer)
        except Exception as err:
            traceback.print_exc()
            answer = {"error": str(err), "kind": type(err).__name__}
        yield {**answer, "id": number}


def _own_pipes() -> tuple[TextIO, TextIO]:
    """Stdin and stdout for requests and answers alone: what libraries print goes to stderr, and they read nothing."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    # It stays open until the process is gone: that is how the other side sees that it is.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def main() -> None:
    """Answer until the end."""
    # Python puts the folder of the script first, whose modules would hide others of their names.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    requests, answers = _own_pipes()
    for answer in answers_to(iter(requests.readline, ""), sys.argv[1]):
        # A line of its own, whatever was printed before the pipes were taken.
        answers.write(f"\n{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    main()
