"""Write the tables of README.md and benchmarks/results/README.md from the files of benchmarks/results.

    python benchmarks/scripts/results_table.py --check

What stands between the markers is replaced; no number there is typed by hand. With --check nothing is written, and it
exits 1 if a document differs from its files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from measured_details import DETAIL_SECTIONS
from measured_sections import Kept, Section
from measured_tables import README_SECTIONS

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import write_atomic

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
# By document, from the root: its sections, and how its links reach the results.
DOCUMENTS: Mapping[str, tuple[Sequence[Section], str]] = {
    "README.md": (README_SECTIONS, "benchmarks/results/"),
    "benchmarks/results/README.md": (DETAIL_SECTIONS, ""),
}


def with_tables(name: str, document: str, sections: Sequence[Section], kept: Kept) -> str:
    """A document with its tables made anew.

    Raises:
        ArtifactError: it has no markers, or a file does not hold what its section shows.
    """
    head, begin, rest = document.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(f"{END}\n")
    if not (begin and end):
        raise ArtifactError(f"{name}: expected lines {BEGIN} and {END}, got none. Put them where the tables go.")
    return head + begin + "\n" + "\n\n".join(section.text(kept) for section in sections) + "\n\n" + end + tail


def outdated(root: Path) -> dict[Path, str]:
    """The documents that differ from their files, and what they ought to be.

    Raises:
        ArtifactError: a document has no markers, or a file does not hold what its section shows.
    """
    wanted = {}
    for name, (sections, prefix) in DOCUMENTS.items():
        path = root / name
        text = path.read_text()
        made = with_tables(name, text, sections, Kept(root / "benchmarks" / "results", prefix))
        if made != text:
            wanted[path] = made
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what is outdated, or only say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is outdated")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    told = parser.parse_args(arguments)
    try:
        wanted = outdated(told.root)
    except ArtifactError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    for path, text in wanted.items():
        if told.check:
            print(f"{path}: its tables are not those of benchmarks/results. Run: {' '.join(sys.argv[:1])}")
        else:
            write_atomic(path, text.encode())
            print(f"{path}: written")
    return 1 if told.check and wanted else 0


if __name__ == "__main__":
    sys.exit(main())
