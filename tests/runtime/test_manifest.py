from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import (
    FORMAT_VERSION,
    Artifact,
    Manifest,
    changed_inputs,
    check_files,
    key_of,
    load_manifest,
    problem_of,
    record_of,
    save_manifest,
    update_manifest,
    write_atomic,
)


def small_manifest(bundle: Path) -> Manifest:
    (bundle / "unet").mkdir(parents=True)
    (bundle / "unet" / "model.onnx").write_bytes(b"graph" * 100)
    artifact = Artifact(
        component="unet",
        precision="fp32",
        path="unet/model.onnx",
        files=("unet/model.onnx",),
        opset=20,
        key="k",
        inputs={"weights": "w"},
        parity={"worst_relative_l2": 1e-6},
        parameters=3,
    )
    files = {"unet/model.onnx": record_of(bundle / "unet" / "model.onnx")}
    manifest = Manifest(
        name="m", pipeline_class="P", latentrt_version="0", files=files, artifacts=(artifact,), options={"a": [1]}
    )
    save_manifest(bundle, manifest)
    return manifest


def test_round_trip(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    assert dataclasses.asdict(load_manifest(tmp_path)) == dataclasses.asdict(manifest)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    path = tmp_path / "unet" / "model.onnx"
    good = path.read_bytes()
    for position in (0, 17, len(good) - 1):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert "unet/model.onnx" in str(problem_of(tmp_path, manifest, "unet/model.onnx"))
    path.write_bytes(good)
    assert problem_of(tmp_path, manifest, "unet/model.onnx") is None


def test_truncated_missing_and_unknown_files(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    path = tmp_path / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="expected 500 bytes, got 499"):
        check_files(tmp_path, manifest, ["unet/model.onnx"], hashes=False)
    path.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        check_files(tmp_path, manifest, ["unet/model.onnx"])
    with pytest.raises(ArtifactError, match="found none"):
        check_files(tmp_path, manifest, ["unet/engines/x.engine"])


def test_newer_format_is_refused(tmp_path: Path) -> None:
    small_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": FORMAT_VERSION + 1}))
    with pytest.raises(ArtifactError, match="newer latentrt"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../x"])
def test_a_name_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    small_manifest(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = {"sha256": "0", "size": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="leaves the bundle"):
        load_manifest(tmp_path)


@given(st.binary(max_size=300))
def test_damaged_manifests_give_one_kind_of_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "manifest.json").write_bytes(data)
    with pytest.raises(ArtifactError):
        load_manifest(bundle)


@given(st.sampled_from(["files", "artifacts", "engines", "name"]), st.sampled_from([None, 3, "x", [1], {"a": 1}]))
def test_manifests_of_the_wrong_types_too(tmp_path_factory: pytest.TempPathFactory, field: str, value: object) -> None:
    bundle = tmp_path_factory.mktemp("bundle")
    small_manifest(bundle)
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    try:
        load_manifest(bundle)
    except ArtifactError:
        return
    assert field == "name"


def _add_option(bundle: str, name: str) -> None:
    for index in range(20):

        def change(manifest: Manifest, option: str = f"{name}{index}") -> Manifest:
            return dataclasses.replace(manifest, options={**manifest.options, option: 1})

        update_manifest(Path(bundle), change)


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    small_manifest(tmp_path)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_option, args=(str(tmp_path), name)) for name in "xy"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(load_manifest(tmp_path).options) == 41


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_keys_depend_on_content_not_order() -> None:
    assert key_of({"a": 1, "b": {"c": 2}}) == key_of({"b": {"c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})


def test_changed_inputs_are_named() -> None:
    old = {"weights": "x", "options": {"opset": 18, "scale": True}, "gone": 1}
    new = {"weights": "x", "options": {"opset": 20, "scale": True}, "new": 1}
    assert changed_inputs(old, new) == ["gone", "new", "options.opset"]
    assert changed_inputs(old, old) == []
