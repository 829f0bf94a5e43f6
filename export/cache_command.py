"""`latentrt cache`: what is kept for later builds and exports, and making room."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from latentrt.runtime.cache_folder import cache_folder
from latentrt.runtime.console import log, print_table
from latentrt.runtime.errors import UsageError

from .cache_contents import CacheItem, cache_items, chosen_for_removal, remove_items, sweep_cache
from .engine_cache import LIMIT_VARIABLE, limit_bytes

_DAY = 86400.0

app = typer.Typer(
    name="cache",
    help="Engines and traced graphs that are kept for later builds and exports.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Folder = Annotated[
    Path | None, typer.Option("--cache", help="The folder. Default: LATENTRT_CACHE, or the user's cache folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_cache(cache: Folder = None, as_json: AsJson = False) -> None:
    """Show what the cache holds: engines by what they were built for, graphs by the network they are of.

    An engine that a bundle shares is a hard link to the bundle's file and takes no room of its own.

    Examples:
      latentrt cache list

      latentrt cache list --json
    """
    root = cache_folder() if cache is None else cache
    items, now = cache_items(root), time.time()
    limit = limit_bytes(root) if root.exists() else None
    if as_json:
        print(json.dumps({**_totals(root, items), "limit_bytes": limit, "items": [_entry(i, now) for i in items]}))
        return
    if not items:
        log(f"{root}: nothing is kept here yet.")
        return
    columns = ("kind", "of", "MB", "MB of its own", "last used", "key")
    print_table(f"{root}", columns, [_row(item, now) for item in items])
    total, alone = (sum(getattr(item, name) for item in items) for name in ("size", "alone"))
    log(f"{_megabytes(total)} MB, of which {_megabytes(alone)} MB are in no bundle")
    if limit is not None:
        log(f"a build keeps such engines within {_megabytes(limit)} MB; {LIMIT_VARIABLE} sets another limit")


@app.command("prune")
def prune(
    keep_gb: Annotated[
        float | None,
        typer.Option(help="Remove engines, those used longest ago first, until so much is left."),
    ] = None,
    older_than: Annotated[float | None, typer.Option(help="Remove what was not used for so many days.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    cache: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Make room. Only the cache's own copies go: a bundle keeps its engines and graphs.

    Without options: what is damaged or half written, and what is beyond the limit that builds keep.

    Examples:
      latentrt cache prune

      latentrt cache prune --keep-gb 10 --older-than 30

      latentrt cache prune --all
    """
    for name, value in (("keep-gb", keep_gb), ("older-than", older_than)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name}: expected a number from 0, got {value}.")
    root = cache_folder() if cache is None else cache
    items, now = cache_items(root), time.time()
    by_option = everything or older_than is not None
    keep = None if by_option else limit_bytes(root) if root.exists() else None
    chosen = chosen_for_removal(
        items,
        now=now,
        keep_bytes=keep if keep_gb is None else int(keep_gb * 1e9),
        older_than=None if older_than is None else older_than * _DAY,
        everything=everything,
    )
    gone = remove_items(root, chosen)
    freed = sum(item.alone for item in gone) + sweep_cache(root)
    busy = [item for item in chosen if item not in gone]
    left = [item for item in items if item not in gone]
    if as_json:
        report = {**_totals(root, left), "freed_bytes": freed}
        print(json.dumps({**report, "removed": [_entry(i, now) for i in gone], "in_use": [i.key for i in busy]}))
        return
    for item in gone:
        log(f"removed {item.kind} {item.key[:16]}: {item.problem or item.what}")
    for item in busy:
        log(f"kept {item.kind} {item.key[:16]}, which is in use: {item.what}")
    log(f"{_megabytes(freed)} MB freed, {len(left)} items left")


def _totals(root: Path, items: Sequence[CacheItem]) -> dict[str, object]:
    sizes = {f"{name}_bytes": sum(getattr(item, name) for item in items) for name in ("size", "alone")}
    return {"cache": str(root), **sizes}


def _entry(item: CacheItem, now: float) -> dict[str, object]:
    return {**asdict(item), "days_since_use": round((now - item.used) / _DAY, 3)}


def _row(item: CacheItem, now: float) -> tuple[str, ...]:
    what = item.what if item.problem is None else f"damaged: {item.problem}"
    return (item.kind, what, _megabytes(item.size), _megabytes(item.alone), _age(now - item.used), item.key[:16])


def _age(seconds: float) -> str:
    for unit, length in (("days", _DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"
