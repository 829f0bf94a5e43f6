"""The manifest of a bundle: what is in it, what each file was made from, and whether it is still that.

A bundle is a folder in the layout of `optimum-cli export onnx` plus `manifest.json`. The manifest is the last
file written by any stage, under a lock, so what it names exists; files it does not name are never loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArtifactError

if TYPE_CHECKING:
    from filelock import BaseFileLock

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 24


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: its SHA-256 (hex) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """One ONNX graph: a component in one precision, for every runtime or rewritten for one.

    Attributes:
        component: unet, text_encoder, vae_decoder, vae_encoder…
        precision: fp32, fp16, int8…
        path: the .onnx file, relative to the bundle.
        files: every file it consists of (the graph and its external data), relative.
        opset: of the default ONNX domain.
        key: SHA-256 of `inputs`; equal keys mean that rebuilding would give the same artifact.
        inputs: what it was made from: hashes of weights and configs, options, tool versions.
        parity: figures of the comparison with the model, by case: max_abs, relative_l2, psnr_db…
        parameters: number of weights.
        target: `cpu` or `cuda`, the provider of ONNX Runtime whose operators it is made of; empty for the graph that
            every runtime takes and that those were made from. Such a graph may keep its weights in the plain one's
            external data.
    """

    component: str
    precision: str
    path: str
    files: tuple[str, ...]
    opset: int
    key: str
    inputs: Mapping[str, Any]
    parity: Mapping[str, Any]
    parameters: int
    target: str = ""


@dataclass(frozen=True)
class EngineRecord:
    """One TensorRT engine and its sidecar, relative to the bundle.

    Attributes:
        targets: the compute capabilities it runs on, such as ("sm89",).
        flavour: tensorrt or tensorrt_rtx.
    """

    component: str
    precision: str
    path: str
    sidecar: str
    key: str
    flavour: str
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything the bundle holds. `files` covers configs, tokenizers, graphs, external data and engines."""

    name: str
    pipeline_class: str
    latentrt_version: str
    source: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()
    engines: tuple[EngineRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    def artifact(self, component: str, precision: str, target: str = "") -> Artifact | None:
        """The graph of a component in a precision, or None."""
        wanted = (component, precision, target)
        return next((a for a in self.artifacts if (a.component, a.precision, a.target) == wanted), None)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex.

    Raises:
        ArtifactError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as err:
        raise ArtifactError(f"{path}: expected a readable file, got {err.strerror}.") from err


def record_of(path: Path) -> FileRecord:
    """Hash and measure a file."""
    return FileRecord(sha256=sha256_of(path), size=path.stat().st_size)


def key_of(inputs: Mapping[str, Any]) -> str:
    """The content key of an artifact: SHA-256 of its inputs as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def changed_inputs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that differ, nested ones dotted: why a cached artifact cannot be reused."""
    changed: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += [f"{name}.{inner}" for inner in changed_inputs(before, after)]
        elif json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True):
            changed.append(name)
    return changed


def scratch_path(final: Path) -> Path:
    """A name of its own beside a file's final one, for what is renamed to it once it is whole."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")


def write_scratch(final: Path, data: memoryview | bytes) -> tuple[Path, FileRecord]:
    """Write data under a temporary name beside its final one, hashed on the way.

    Raises:
        OSError: naming the file, such as for a full disk; nothing is left behind.
    """
    scratch = scratch_path(final)
    digest = hashlib.sha256()
    view = memoryview(data).cast("B")
    try:
        with scratch.open("xb") as stream:
            for start in range(0, len(view), _CHUNK):
                piece = view[start : start + _CHUNK]
                stream.write(piece)
                digest.update(piece)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException as err:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        if isinstance(err, OSError):
            # The scratch file's name would mean nothing to the reader of the message.
            raise OSError(err.errno, err.strerror, str(final)) from err
        raise
    return scratch, FileRecord(sha256=digest.hexdigest(), size=len(view))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new, and a reader sees one of them.

    Raises:
        OSError: naming the file, such as for a full disk; nothing is left behind.
    """
    scratch, _ = write_scratch(path, data)
    try:
        os.replace(scratch, path)
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def load_manifest(bundle: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        ArtifactError: it is missing, is not a manifest, or is of a newer format version.
    """
    path = bundle / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise ArtifactError(
            f"{bundle}: expected a latentrt bundle with {MANIFEST}, found none. "
            "Make one with: latentrt export CHECKPOINT -o BUNDLE"
        ) from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: expected a JSON manifest, got {err}. Export the bundle again.") from err
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path}: expected a latentrt manifest, got no format_version. Export the bundle again.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: expected format version {FORMAT_VERSION} or older, got {version}. "
            "The bundle was made by a newer latentrt: upgrade this one."
        )
    try:
        return _decode(content)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise ArtifactError(f"{path}: expected a complete manifest, got {err!r}. Export the bundle again.") from err


def _decode(content: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(**record) for name, record in content["files"].items()}
    for name in files:
        # A manifest is data from elsewhere: it must not lead the reader out of its folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file name {name!r} leaves the bundle")
    artifacts = tuple(Artifact(**{**a, "files": tuple(a["files"])}) for a in content["artifacts"])
    engines = tuple(EngineRecord(**{**e, "targets": tuple(e["targets"])}) for e in content["engines"])
    named = [name for a in artifacts for name in (a.path, *a.files)]
    named += [name for e in engines for name in (e.path, e.sidecar)]
    for name in named:
        if name not in files:
            raise ValueError(f"{name!r} is named by an artifact and not listed in files")
    return Manifest(**{**content, "files": files, "artifacts": artifacts, "engines": engines})


def save_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically. Stages use `update_manifest`, which also takes the lock."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, default=str)
    write_atomic(bundle / MANIFEST, text.encode() + b"\n")


def lock_of(bundle: Path) -> BaseFileLock:
    """The lock that a stage holds while it moves files into the bundle and rewrites the manifest."""
    from filelock import FileLock

    return FileLock(bundle / ".lock")


def update_manifest(bundle: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Read, change and write the manifest under the bundle's lock, so that no other process's change is lost."""
    with lock_of(bundle):
        manifest = change(load_manifest(bundle))
        save_manifest(bundle, manifest)
    return manifest


def problem_of(bundle: Path, manifest: Manifest, name: str, *, hashes: bool = True) -> str | None:
    """What is wrong with one file of the bundle, or None.

    Args:
        name: relative path, as in `manifest.files`.
        hashes: also compare the SHA-256; otherwise presence and size only.
    """
    record = manifest.files.get(name)
    path = bundle / name
    if record is None:
        return f"{path}: expected an entry in {MANIFEST}, found none. Only files the manifest names are loaded."
    try:
        size = path.stat().st_size
    except OSError as err:
        return f"{path}: expected {record.size} bytes, got {err.strerror}. Export or build it again."
    if size != record.size:
        return f"{path}: expected {record.size} bytes, got {size}. The file is truncated or changed: make it again."
    if hashes and (found := sha256_of(path)) != record.sha256:
        return (
            f"{path}: expected SHA-256 {record.sha256[:16]}…, got {found[:16]}…. "
            "The file was changed after it was made: make it again."
        )
    return None


def check_files(bundle: Path, manifest: Manifest, names: Iterable[str], *, hashes: bool = True) -> None:
    """Check files before they are loaded.

    Raises:
        ArtifactError: the first file that is missing, truncated, changed or not in the manifest.
    """
    for name in names:
        if problem := problem_of(bundle, manifest, name, hashes=hashes):
            raise ArtifactError(problem)
