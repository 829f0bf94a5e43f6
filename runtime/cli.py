"""The `latentrt` command: finds the subcommands that the installed folders contribute, and reports errors.

A subcommand's module is imported only when it is called or listed, and imports its heavy packages itself, so
`latentrt generate` starts without looking at what export needs.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .errors import LatentrtError, UsageError

GROUP = "latentrt.commands"
CANCELLED = "cancelled; nothing is left half written."


def load_command(name: str) -> Any | None:
    """The click command of a subcommand, or None if no installed folder contributes it."""
    found = [entry for entry in entry_points(group=GROUP) if entry.name == name]
    if not found:
        return None
    loaded = found[0].load()
    if isinstance(loaded, typer.Typer):  # a group of its own, such as `latentrt cache list`
        group = typer.main.get_command(loaded)
        group.name = name
        return group
    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.command(name=name)(loaded)
    return typer.main.get_command(app)


class EntryPointGroup(TyperGroup):
    """A group whose subcommands are the entry points of `latentrt.commands`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of use."""
        order = [
            "export",
            "optimize",
            "lora",
            "plan",
            "build",
            "cache",
            "calibrate",
            "generate",
            "replay",
            "samplers",
            "bench",
            "inspect",
            "verify",
            "doctor",
        ]
        names = {entry.name for entry in entry_points(group=GROUP)}
        return [name for name in order if name in names] + sorted(names - set(order))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load one subcommand."""
        return load_command(cmd_name)


app = typer.Typer(
    cls=EntryPointGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stable Diffusion checkpoints to verified ONNX and TensorRT engines, run without PyTorch.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"latentrt {version('latentrt')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print it."),
) -> None:
    """Options of every subcommand: --debug shows the traceback of an error."""


def describe_os_error(err: OSError) -> str:
    """One sentence for the failures of a disk, saying which file and what to do."""
    where = err.filename or "the output"
    if err.errno == errno.ENOSPC:
        return f"{where}: expected room to write, got a full disk. Free space and run the same command again."
    if err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: expected permission to write or read, got {err.strerror}. Choose another folder."
    return f"{where}: {err.strerror or err}"


def fail(message: str, *, code: int, as_json: bool) -> int:
    """Report one error, on stderr for people or as JSON on stdout for machines."""
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    else:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False, style="red")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 success, 2 usage error, 1 any other failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = "--debug" in words, "--json" in words
    words = [word for word in words if word != "--debug"]
    try:
        result = app(args=words, prog_name="latentrt", standalone_mode=False)
    except KeyboardInterrupt:
        return fail(CANCELLED, code=130, as_json=as_json)
    except Exception as err:
        if debug:
            raise
        return _exit_code_of(err, as_json=as_json)
    if result == 130:  # typer turns Ctrl-C into this exit code without a word
        return fail(CANCELLED, code=130, as_json=as_json)
    return result if isinstance(result, int) else 0


def _exit_code_of(err: Exception, *, as_json: bool) -> int:
    if isinstance(err, LatentrtError):
        return fail(str(err), code=2 if isinstance(err, UsageError) else 1, as_json=as_json)
    if isinstance(err, OSError):
        return fail(describe_os_error(err), code=1, as_json=as_json)
    if isinstance(err, MemoryError):
        return fail(
            "memory: expected more than this machine has free. Use a smaller size or batch.", code=1, as_json=as_json
        )
    # click's own errors and exits, recognised by their interface: typer may bring a click of its own.
    if hasattr(err, "exit_code"):
        if hasattr(err, "format_message"):
            hint = " See: latentrt --help"
            return fail(f"{err.format_message()}{hint}", code=int(err.exit_code), as_json=as_json)
        return int(err.exit_code)
    if type(err).__name__ == "Abort":
        return fail(CANCELLED, code=130, as_json=as_json)
    return fail(
        f"unexpected {type(err).__name__}: {err}. Run again with --debug and report it.", code=1, as_json=as_json
    )


if __name__ == "__main__":
    sys.exit(main())
