from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from latentrt.export.hub import download, files_to_read, is_hub_id
from latentrt.runtime.errors import ArtifactError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = [
    "README.md",
    "model_index.json",
    "sd.safetensors",
    "sd.ckpt",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "unet/model.onnx",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.bin",
]
READ = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
]


class Hub:
    """A hub of one repository, which writes down what it is asked for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.files = FILES
        self.failure: Exception | None = None
        self.download_failure: Exception | None = None
        self.asked: list[Any] = []

    def model_info(self, repo_id: str, *, revision: str | None = None) -> SimpleNamespace:
        self.asked.append((repo_id, revision))
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        self.asked.append((repo_id, revision, allow_patterns, local_files_only))
        if local_files_only and not (self.cache / COMMIT).is_dir():
            raise errors.LocalEntryNotFoundError("nothing cached")
        if self.download_failure is not None:
            raise self.download_failure
        return str(self.cache / COMMIT)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    made = Hub(tmp_path / "snapshots")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def http_error(kind: Callable[..., Exception]) -> Exception:
    return kind("no", response=Mock(headers={}, status_code=404))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://owner/name", True),
        ("hf://owner/name@v1.0", True),
        ("hf://owner/name@refs/pr/3", True),
        (Path("hf://owner/name"), True),
        ("owner/name", True),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5@main", True),
        ("owner/name.safetensors", False),
        ("checkpoints/model.ckpt", False),
        ("/absolute/path", False),
        ("a/b/c", False),
        ("name", False),
        ("./name", False),
        ("hf://owner", False),
    ],
)
def test_what_is_meant_for_the_hub(source: str | Path, expected: bool) -> None:
    assert is_hub_id(source) is expected


def test_a_local_path_goes_before_an_id_unless_the_scheme_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")
    assert not is_hub_id(Path("owner/name"))
    assert is_hub_id("hf://owner/name")


def test_only_what_an_export_reads_is_downloaded_at_the_commit_of_the_revision(hub: Hub) -> None:
    snapshot = download("hf://owner/name@v1.0")
    assert (snapshot.repo_id, snapshot.commit, snapshot.path) == ("owner/name", COMMIT, hub.cache / COMMIT)
    assert hub.asked == [("owner/name", "v1.0"), ("owner/name", COMMIT, READ, False)]


def test_the_main_branch_is_taken_without_a_revision(hub: Hub) -> None:
    assert download("owner/name").commit == COMMIT
    assert hub.asked[0] == ("owner/name", None)


def test_half_precision_is_read_where_there_is_no_other() -> None:
    names = ["unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors", "unet/pytorch_model.bin"]
    assert files_to_read(names) == names[:1]
    assert files_to_read(["unet/diffusion_pytorch_model.safetensors", *names]) == [
        "unet/diffusion_pytorch_model.safetensors"
    ]


@pytest.mark.parametrize("failure", [ConnectionError("no route"), errors.OfflineModeIsEnabled("offline")])
def test_offline_the_cache_is_enough(hub: Hub, failure: Exception) -> None:
    hub.failure = failure
    (hub.cache / COMMIT).mkdir(parents=True)
    snapshot = download("owner/name@v1.0")
    assert (snapshot.path, snapshot.commit) == (hub.cache / COMMIT, COMMIT)
    assert hub.asked[1] == ("owner/name", "v1.0", ["model_index.json"], True)


def test_offline_without_a_cache_the_error_says_what_to_do(hub: Hub) -> None:
    hub.failure = ConnectionError("no route")
    with pytest.raises(ArtifactError, match=r"hf://owner/name: .*no route\. Download it where there is a network"):
        download("owner/name")


@pytest.mark.parametrize("kind", [errors.RepositoryNotFoundError, errors.RevisionNotFoundError])
def test_a_repository_that_is_not_there_is_named(hub: Hub, kind: Callable[..., Exception]) -> None:
    hub.failure = http_error(kind)
    with pytest.raises(ArtifactError, match=r"hf://owner/name@v9: expected a repository and revision .* found neither"):
        download("owner/name@v9")


def test_a_gated_repository_is_said_to_be_one(hub: Hub) -> None:
    hub.failure = http_error(errors.GatedRepoError)
    with pytest.raises(ArtifactError, match=r"asks for consent.*hf auth login"):
        download("owner/name")


def test_a_repository_without_a_diffusers_checkpoint_points_to_its_file(hub: Hub) -> None:
    hub.files = ["README.md", "sd.safetensors"]
    with pytest.raises(ArtifactError, match=r"found none in 2 files\. Download sd\.safetensors and give the file"):
        download("owner/name")
    assert len(hub.asked) == 1


def test_an_interrupted_download_can_be_run_again(hub: Hub) -> None:
    hub.download_failure = ConnectionResetError("reset")
    with pytest.raises(ArtifactError, match=r"got reset\. Run the same command again"):
        download("owner/name")


def test_what_is_no_id_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected hf://owner/name"):
        download("hf://owner/name/folder")
