"""Checkpoints from the Hugging Face hub: what an export reads of a repository, at one commit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, UsageError

_SCHEME = "hf://"
# `hf:/` is what is left of the scheme in a Path.
_ID = re.compile(r"(?P<scheme>hf:/{1,2})?(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".onnx")
_READ = (
    "model_index.json",
    "*/config.json",
    "scheduler/*.json",
    "tokenizer*/*.json",
    "tokenizer*/*.txt",
    "feature_extractor/*.json",
    "*/*.safetensors.index*.json",
)
_WEIGHTS = re.compile(r"(?P<stem>[^/]+/(model|diffusion_pytorch_model))(-\d+-of-\d+)?\.safetensors")
# The same in half precision; libraries differ in where a shard's name has the variant.
_HALF = re.compile(r"(?P<stem>[^/]+/(model|diffusion_pytorch_model))(-\d+-of-\d+)?\.fp16(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A repository as it was at one commit.

    Attributes:
        path: the folder, in the hub's cache.
        repo_id: owner/name.
        commit: its hash, whatever branch or tag was asked for.
    """

    path: Path
    repo_id: str
    commit: str


def is_hub_id(source: Path | str) -> bool:
    """Whether a source is meant for the hub: `hf://owner/name@revision`, or `owner/name` that is no local path."""
    match = _ID.fullmatch(str(source))
    if match is None:
        return False
    return bool(match["scheme"]) or not (Path(source).exists() or match["repo"].endswith(_FILE_ENDINGS))


def download(source: Path | str) -> Snapshot:
    """Download what an export reads of a diffusers repository; never pickles, and full precision where there is some.

    What is in the hub's cache already is not downloaded again, and is enough where the hub cannot be reached.

    Args:
        source: as `is_hub_id` takes it; without a revision, the main branch.

    Raises:
        UsageError: the source is no id of a repository.
        ArtifactError: there is no such repository or revision, it holds no diffusers checkpoint, or the hub cannot be
            reached and the cache does not have it.
    """
    match = _ID.fullmatch(str(source))
    if match is None:
        raise UsageError(f"{source}: expected {_SCHEME}owner/name or {_SCHEME}owner/name@revision.")
    repo_id, revision = match["repo"], match["revision"]
    import huggingface_hub
    from huggingface_hub import errors

    shown = f"{_SCHEME}{repo_id}" + (f"@{revision}" if revision else "")
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
    except errors.GatedRepoError as err:
        raise ArtifactError(
            f"{shown}: expected a repository that is open to you, got one that asks for consent. "
            "Accept its terms on the hub, and log in: hf auth login"
        ) from err
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as err:
        raise ArtifactError(
            f"{shown}: expected a repository and revision of the hub, or a folder or file here, found neither. "
            "Check the name; a private repository needs: hf auth login"
        ) from err
    except Exception as err:  # of the HTTP client, whichever the library uses
        return _cached(huggingface_hub, repo_id, revision, shown, err)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    if "model_index.json" not in names:
        single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
        advice = f"Download {single[0]} and give the file." if single else "Choose another repository."
        raise ArtifactError(
            f"{shown}: expected a diffusers checkpoint, with model_index.json, found none in {len(names)} files. "
            f"{advice}"
        )
    commit = str(info.sha)
    try:
        path = huggingface_hub.snapshot_download(repo_id, revision=commit, allow_patterns=files_to_read(names))
    except Exception as err:  # as above; what arrived stays in the cache
        raise ArtifactError(
            f"{shown}: expected to download commit {commit}, got {err}. "
            "Run the same command again: it goes on where it stopped."
        ) from err
    return Snapshot(Path(path), repo_id, commit)


def files_to_read(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that an export reads.

    Weights in half precision are left out where a component has them in full precision too.
    """
    names = list(names)
    whole = {match["stem"] for match in map(_WEIGHTS.fullmatch, names) if match}
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in _READ)
        or _WEIGHTS.fullmatch(name)
        or ((match := _HALF.fullmatch(name)) and match["stem"] not in whole)
    ]


def _cached(hub: Any, repo_id: str, revision: str | None, shown: str, reason: Exception) -> Snapshot:
    """The snapshot that an earlier download left, where the hub cannot be reached."""
    try:
        # Not all that is read: the library takes what was left out on purpose for an incomplete download. What is
        # missing is said when the checkpoint is opened.
        patterns = ["model_index.json"]
        path = Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=patterns))
    except Exception as err:  # several of the library's, by what of the cache is missing
        raise ArtifactError(
            f"{shown}: expected to reach the Hugging Face hub, or to find the checkpoint in its cache, got: {reason}. "
            "Download it where there is a network, and give the folder."
        ) from err
    return Snapshot(path, repo_id, path.name)
