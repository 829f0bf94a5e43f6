"""Score pictures of shapes against the prompts they were made from, or say what single pictures show.

    python examples/shapes/score.py picture.png other.png --json
    python examples/shapes/score.py --requests requests.json pictures/

`requests.json` is a list of objects with the fields of `scenes.Request`, one per picture in the order of the names.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from look import Sighting, look
from PIL import Image
from scenes import COLOURS, PLACES, SHAPES, SIZES, Request, random_prompt, random_scene

CONTENT = ("colour", "background", "shape")
LAYOUT = ("place", "size")


@dataclass(frozen=True)
class Tally:
    """How many of how many were right."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share that was right; NaN when nothing was asked."""
        return self.right / self.total if self.total else math.nan

    def interval(self, z: float = 1.959964) -> tuple[float, float]:
        """Wilson score interval (Wilson 1927) of the accuracy, 95 % unless told."""
        if not self.total:
            return 0.0, 1.0
        share, n = self.accuracy, self.total
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Score:
    """Right answers per attribute, over the requests that state it.

    `content` is colour, background and shape all right, `layout` place and size: of these, those that are stated.
    """

    colour: Tally
    background: Tally
    shape: Tally
    place: Tally
    size: Tally
    content: Tally
    layout: Tally

    def __str__(self) -> str:
        """A line for each tally."""
        lines = []
        for field in fields(self):
            tally = getattr(self, field.name)
            low, high = tally.interval()
            share = f"{tally.accuracy:6.1%}" if tally.total else "   -  "
            lines.append(f"{field.name:10} {share}  {tally.right}/{tally.total}  95 % interval {low:.1%} to {high:.1%}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Counts, accuracy (None when nothing was asked) and interval under each name."""
        tallies = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: {
                "right": tally.right,
                "total": tally.total,
                "accuracy": tally.accuracy if tally.total else None,
                "interval": tally.interval(),
            }
            for name, tally in tallies.items()
        }


def _count(requests: Sequence[Request], sightings: Sequence[Sighting], names: Sequence[str]) -> Tally:
    """Pictures that show all that was asked of `names`, among the requests that state any of them."""
    outcomes = []
    for request, sighting in zip(requests, sightings, strict=True):
        stated = [name for name in names if getattr(request, name) is not None]
        if stated:
            outcomes.append(all(getattr(request, name) == getattr(sighting, name) for name in stated))
    return Tally(sum(outcomes), len(outcomes))


def score(requests: Sequence[Request], images: Sequence[Image.Image | npt.NDArray[np.uint8]]) -> Score:
    """Look at the picture of each request and count what is as asked.

    Raises:
        ValueError: There is not one picture per request, or `look` cannot take one.
    """
    return tally(requests, [look(image) for image in images])


def tally(requests: Sequence[Request], sightings: Sequence[Sighting]) -> Score:
    """Count what is as asked in pictures that were looked at already.

    Raises:
        ValueError: There is not one sighting per request.
    """
    if len(requests) != len(sightings):
        raise ValueError(f"pictures: expected one per request, got {len(sightings)} for {len(requests)} requests.")
    groups = {name: (name,) for name in (*CONTENT, *LAYOUT)} | {"content": CONTENT, "layout": LAYOUT}
    return Score(**{name: _count(requests, sightings, group) for name, group in groups.items()})


def evaluation_requests(count: int, seed: int = 0) -> list[Request]:
    """Different random prompts to judge a model by: all state colour, background and shape, most size and place.

    They come from a generator that no training seed under 10 000 gives.

    Raises:
        ValueError: `count` or `seed` is negative.
    """
    if not (count >= 0 and seed >= 0):
        raise ValueError(f"count, seed: expected 0 or more, got {count}, {seed}.")
    rng = np.random.default_rng([10_000 + seed])
    requests: dict[str, Request] = {}
    while len(requests) < count:
        request = random_prompt(random_scene(rng), rng)
        if all(getattr(request, name) is not None for name in CONTENT):
            requests.setdefault(request.prompt, request)
    return list(requests.values())


def read_requests(path: Path) -> list[Request]:
    """Requests from a JSON list of objects with the fields of `Request`; a missing attribute is not stated.

    Raises:
        ValueError: The file is no such list, or names what is not in the data set.
    """
    known = {"shape": SHAPES, "colour": COLOURS, "background": COLOURS, "size": SIZES, "place": PLACES}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: expected JSON, got something else ({err}).") from err
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of objects, got something else.")
    for number, entry in enumerate(entries):
        for name, value in entry.items():
            if name == "prompt" or (name in known and (value is None or value in known[name])):
                continue
            allowed = f"one of {', '.join(known[name])}" if name in known else f"prompt, {', '.join(known)}"
            raise ValueError(f"{path}: entry {number}, {name}: expected {allowed}, got {value!r}.")
    return [Request(**({"prompt": ""} | dict.fromkeys(known) | entry)) for entry in entries]


def _look_at(path: Path) -> Sighting:
    try:
        with Image.open(path) as picture:
            return look(picture)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err


def _picture_paths(given: Sequence[Path]) -> list[Path]:
    paths: list[Path] = []
    for start in given:
        found = sorted(start.glob("*.png")) if start.is_dir() else [start]
        if not found:
            raise ValueError(f"{start}: expected a folder with PNG files, got none.")
        paths += found
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: say what each picture shows, or how well a set of them does what its prompts ask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures, or folders of PNG files taken by name")
    parser.add_argument("--requests", type=Path, help="JSON list of what was asked, one entry per picture in order")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        requests = read_requests(options.requests) if options.requests else None
        paths = _picture_paths(options.pictures)
        sightings = [_look_at(path) for path in paths]
        result = tally(requests, sightings) if requests is not None else None
    except (OSError, ValueError) as err:
        parser.error(str(err))
    if options.json:
        seen = [{"picture": str(path), **asdict(sighting)} for path, sighting in zip(paths, sightings, strict=True)]
        print(json.dumps({"score": result.to_json(), "pictures": seen} if result else seen, indent=2))
    elif result:
        print(result)
    else:
        print("\n".join(f"{path}: {sighting}" for path, sighting in zip(paths, sightings, strict=True)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
