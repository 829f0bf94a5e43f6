"""Putting quantized graphs into a bundle, in the place of those of the same precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.export.staging import commit
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, record_of


def put_in(bundle: Path, folder: Path, artifacts: Sequence[Artifact], others: Sequence[str] = ()) -> Manifest:
    """Move new graphs of one component and precision into a bundle, all or nothing.

    All that it held of them goes: graphs for other targets, and engines, unless their graph is the same as before.

    Args:
        folder: of the bundle, where the files were made under the names that they are to have.
        artifacts: the graphs; `made_from` of their inputs are files of the bundle with their SHA-256.
        others: files that belong to them and are no part of a graph.

    Raises:
        ArtifactError: what they were made from was changed meanwhile.
        OSError: the files cannot be moved. What the manifest names is whole.
    """
    identity = {(a.component, a.precision) for a in artifacts}
    names = (*(name for artifact in artifacts for name in artifact.files), *others)
    staged = {name: (folder / name, record_of(folder / name)) for name in names}

    def change(before: Manifest | None) -> Manifest:
        _check_sources(bundle, before, artifacts)
        assert before is not None
        kept = [a for a in before.artifacts if (a.component, a.precision) not in identity]
        same = {
            (a.component, a.precision)
            for a in artifacts
            if not a.target and all(before.files.get(name) == staged[name][1] for name in a.files)
        }
        engines = [
            e
            for e in before.engines
            if (e.component, e.precision) in same or (e.component, e.precision) not in identity
        ]
        owned = {name for a in before.artifacts for name in a.files}
        owned |= {name for e in before.engines for name in (e.path, e.sidecar)}
        wanted = {name for a in (*kept, *artifacts) for name in a.files}
        wanted |= {name for e in engines for name in (e.path, e.sidecar)}
        order = list(dict.fromkeys(a.component for a in before.artifacts))
        return dataclasses.replace(
            before,
            files={name: record for name, record in before.files.items() if name in wanted or name not in owned},
            artifacts=tuple(sorted([*kept, *artifacts], key=lambda a: order.index(a.component))),
            engines=tuple(engines),
        )

    return commit(bundle, staged, change)


def _check_sources(bundle: Path, before: Manifest | None, artifacts: Sequence[Artifact]) -> None:
    held: Mapping[str, FileRecord] = before.files if before is not None else {}
    for artifact in artifacts:
        for name, sha256 in artifact.inputs["made_from"].items():
            if name not in held or held[name].sha256 != sha256:
                raise ArtifactError(f"{bundle / name}: it was exported anew meanwhile. Run the same command again.")
