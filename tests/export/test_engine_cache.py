from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
from _thread import interrupt_main
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engine_bundle import build_once, make_bundle

from latentrt.export import engine_cache, engine_jobs, engine_making, scratch_files
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_cache import LIMIT_VARIABLE, entry_folders, find_engine, key_lock, limit_bytes
from latentrt.export.engine_jobs import build_engines
from latentrt.export.engine_making import BUILT, FROM_CACHE, UP_TO_DATE, EngineResult
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.manifest import check_files, load_manifest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

DECODER = BuildOptions(target="sm89", components=("vae_decoder",), size="64")
# The tests look at ahead-of-time builds, whatever the machine they run on has.
NO_GPU = Machine(packages=probe_machine().packages, why_no_gpu="tests build ahead of time", platform="linux_x86_64")


def build(bundle: Path, announced: list[str] | None = None, **changes: Any) -> list[EngineResult]:
    announce: Callable[[str], None] = (lambda text: None) if announced is None else announced.append
    return build_engines(bundle, dataclasses.replace(DECODER, **changes), machine=NO_GPU, announce=announce)


def not_built(*_: Any, **__: Any) -> Any:
    raise AssertionError("built")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    build_once(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.mark.parametrize("linked", [True, False])
def test_another_bundle_takes_an_engine_over_without_a_build(
    bundle: Path, tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:  # as between two disks
        monkeypatch.setattr(os, "link", partial(_refuse, 18))
    (first,) = build(bundle)
    other = make_bundle(tmp_path / "other")
    monkeypatch.setattr(engine_making, "build_engine", not_built)
    (taken,) = build(other)
    assert (first.status, taken.status) == (BUILT, FROM_CACHE)
    assert (taken.sidecar, taken.path) == (first.sidecar, first.path)
    manifest = load_manifest(other)
    check_files(other, manifest, manifest.files)
    assert manifest.engines == load_manifest(bundle).engines
    assert (bundle / first.path).samefile(other / first.path) == linked
    (again,) = build(other)
    assert again.status == UP_TO_DATE
    with pytest.raises(AssertionError, match="built"):
        build(make_bundle(tmp_path / "third"), cache="off")


def _refuse(number: int, *_: Any, **__: Any) -> Any:
    raise OSError(number, os.strerror(number))


def test_a_change_of_the_batch_leaves_text_encoder_and_vae_untouched(bundle: Path) -> None:
    build(bundle, components=None)
    statuses = {r.sidecar.component: r.status for r in build(bundle, components=None, batch="2")}
    assert statuses == {"text_encoder": UP_TO_DATE, "unet": BUILT, "vae_decoder": UP_TO_DATE}
    statuses = {r.sidecar.component: r.status for r in build(bundle, components=None, batch="2", text_chunks="1..3")}
    assert statuses == {"text_encoder": UP_TO_DATE, "unet": BUILT, "vae_decoder": UP_TO_DATE}


def test_on_a_miss_the_nearest_engine_is_named_the_bundles_own_first(bundle: Path, tmp_path: Path) -> None:
    (first,) = build(bundle)
    other = make_bundle(tmp_path / "other")
    (shared,) = build(other, workspace_mib=64)
    assert shared.changed == ("options.workspace_mib",)
    assert shared.nearest == f"{first.path} of the cache"
    assert shared.reason == (
        f"differs from the nearest engine before it, {first.path} of the cache, in: options.workspace_mib"
    )
    (own,) = build(other, workspace_mib=64, optimization_level=1)
    assert (own.changed, own.nearest) == (("options.optimization_level",), shared.path)
    (none,) = build(other, components=("text_encoder",))
    assert (none.changed, none.nearest, none.reason) == ((), None, None)
    (larger,) = build(other, size="64..72..128", workspace_mib=64)
    assert larger.changed == ("profiles.0.latent_sample.max", "profiles.0.latent_sample.opt")
    assert str(larger.reason).endswith("in: profiles")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["engine", "truncated", "sidecar", "no sidecar", "no entry", "entry"])
def test_a_damaged_entry_is_dropped_and_built_again_and_this_is_said(bundle: Path, tmp_path: Path, damage: str) -> None:
    (first,) = build(bundle)
    shutil.rmtree(bundle)
    (folder,) = entry_folders(tmp_path / "cache")
    (engine,) = folder.glob("*.engine")
    sidecar, entry = engine.with_suffix(".json"), folder / "entry.json"
    if damage == "truncated":
        os.truncate(engine, 1000)
    elif damage.startswith("no "):
        (sidecar if damage == "no sidecar" else entry).unlink()
    elif damage == "sidecar":  # whole JSON, another figure
        sidecar.write_text(sidecar.read_text().replace('"activation_bytes": ', '"activation_bytes": 1'))
    else:
        _flip(engine if damage == "engine" else entry)
    bundle = make_bundle(bundle)
    (again,) = build(bundle)
    assert again.status == BUILT
    assert [note for note in again.notes if note.startswith("dropped a damaged engine from the cache: ")]
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)
    shutil.rmtree(bundle)
    (taken,) = build(make_bundle(bundle))
    assert (taken.status, taken.notes) == (FROM_CACHE, ())
    assert taken.sidecar.key == first.sidecar.key


def test_a_damaged_entry_of_another_engine_makes_room_and_this_is_said(bundle: Path, tmp_path: Path) -> None:
    (first,) = build(bundle)
    os.truncate(bundle / first.path, 1000)
    (other,) = build(make_bundle(tmp_path / "other"), workspace_mib=64)
    (note,) = other.notes
    assert note.startswith("dropped a damaged engine from the cache: ")
    assert Path(first.path).name in note
    assert [path.name for path in entry_folders(tmp_path / "cache")] == [other.sidecar.key]


def test_an_entry_under_the_name_of_another_key_is_not_taken(bundle: Path, tmp_path: Path) -> None:
    (first,) = build(bundle)
    (other,) = build(make_bundle(tmp_path / "other"), workspace_mib=64)
    wrong = tmp_path / "cache/engines" / other.sidecar.key
    shutil.rmtree(wrong)
    shutil.copytree(tmp_path / "cache/engines" / first.sidecar.key, wrong)
    for path in list(wrong.iterdir()):
        path.rename(path.with_name(path.name.replace(first.sidecar.key[:16], other.sidecar.key[:16])))
    entry = wrong / "entry.json"
    entry.write_text(entry.read_text().replace(first.sidecar.key[:16], other.sidecar.key[:16]))
    (again,) = build(make_bundle(tmp_path / "third"), workspace_mib=64)
    assert again.status == BUILT
    assert "expected the engine of this key" in again.notes[0]


def test_a_missing_engine_of_the_bundle_comes_back_from_the_cache_and_what_was_wrong_is_said(bundle: Path) -> None:
    (first,) = build(bundle)
    (bundle / first.path).unlink()
    (again,) = build(bundle)
    assert again.status == FROM_CACHE
    assert str(again.reason).startswith("the one that was there could not be used: ")
    assert first.path in str(again.reason)
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)


def test_force_builds_and_replaces_what_the_cache_has(bundle: Path, cache: Path) -> None:
    (first,) = build(bundle)
    (forced,) = build(bundle, force=True)
    assert (forced.status, forced.changed) == (BUILT, ())
    entry = find_engine(cache, first.sidecar.key)
    assert entry is not None
    assert entry.sidecar == forced.sidecar
    assert (entry.folder / Path(first.path).name).samefile(bundle / first.path)


def test_a_cache_that_cannot_be_written_costs_time_only(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="cache: expected auto, off or a folder that can be written"):
        build(bundle, cache=str(tmp_path / "file"))
    announced: list[str] = []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    (result,) = build(bundle, announced)
    assert result.status == BUILT
    assert "file: cannot be written, so engines are kept in the bundle only." in announced[0]


def test_a_full_disk_of_the_cache_leaves_the_bundles_engine_and_half_of_nothing(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied_in_part(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(engine_cache, "link_or_copy", copied_in_part)
    (result,) = build(bundle)
    assert result.status == BUILT
    assert "not kept in the cache: " in result.notes[0]
    assert "No space left" in result.notes[0]
    assert [path for path in (cache / "engines").iterdir() if not path.name.endswith(".lock")] == []
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)


def test_a_disk_that_is_full_when_an_engine_is_taken_over_is_named_and_nothing_is_left(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = build(bundle)
    other = make_bundle(tmp_path / "other")
    monkeypatch.setattr(os, "link", partial(_refuse, 18))
    monkeypatch.setattr(shutil, "copyfileobj", partial(_refuse, 28))
    with pytest.raises(OSError, match="No space left") as caught:
        build(other)
    assert caught.value.filename == str(other / first.path)
    assert list((other / "vae_decoder/engines").iterdir()) == []
    assert load_manifest(other).engines == ()


# A build that waits in the builder until another process has been told to wait for it.
SLOW = """
import sys, time
from pathlib import Path
from latentrt.export import engine_making
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_jobs import build_engines
folder, bundle = Path(sys.argv[1]), Path(sys.argv[2])
real = engine_making.build_engine
def slow(*args, **kwargs):
    (folder / f"building-{bundle.name}").touch()
    end = time.monotonic() + 60
    while not (folder / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return real(*args, **kwargs)
engine_making.build_engine = slow
def announce(text):
    if "waiting for it" in text:
        (folder / "waiting").touch()
(result,) = build_engines(
    bundle, BuildOptions(target="sm89", components=("vae_decoder",), size="64"), announce=announce)
print(result.status)
"""


def _start(folder: Path, bundle: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SLOW, str(folder), str(bundle)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_want_one_engine_build_it_once(bundle: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other")
    runs = [_start(tmp_path, path) for path in (bundle, other)]
    said = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(said) == [BUILT, FROM_CACHE]
    assert len(list(tmp_path.glob("building-*"))) == 1
    for path in (bundle, other):
        check_files(path, load_manifest(path), load_manifest(path).files)


def test_builds_of_other_keys_do_not_wait(bundle: Path, cache: Path) -> None:
    (first,) = build(bundle)
    with key_lock(cache, first.sidecar.key):
        (other,) = build(bundle, workspace_mib=64)
    assert other.status == BUILT


def test_waiting_for_another_build_can_be_cancelled(bundle: Path, cache: Path) -> None:
    (first,) = build(bundle)
    held, done = threading.Event(), threading.Event()

    def other() -> None:
        with key_lock(cache, first.sidecar.key):
            held.set()
            done.wait(60)

    def announce(text: str) -> None:
        assert "another process is at work on this engine" in text
        interrupt_main()

    holder = threading.Thread(target=other)
    holder.start()
    assert held.wait(60)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, DECODER, machine=NO_GPU, announce=announce)
    done.set()
    holder.join()
    assert build(bundle)[0].status == UP_TO_DATE


KILLED_IN_WRITING = """
import os, signal, sys
from pathlib import Path
from latentrt.export import engine_store
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_jobs import build_engines
engine_store._move_in = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
build_engines(Path(sys.argv[1]), BuildOptions(target="sm89", components=("vae_decoder",), size="64"))
"""


def test_a_killed_process_leaves_nothing_that_counts_and_what_it_leaves_goes_once_it_is_stale(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_IN_WRITING, str(bundle)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    scratch = [path for path in (bundle / "vae_decoder/engines").iterdir() if path.suffix == ".tmp"]
    assert len(scratch) == 3
    assert load_manifest(bundle).engines == ()
    assert entry_folders(cache) == []
    announced: list[str] = []
    (result,) = build(bundle, announced)
    assert result.status == BUILT
    assert not [text for text in announced if "waiting" in text]  # its lock went with it
    assert all(path.exists() for path in scratch)  # they may be another process's
    monkeypatch.setattr(engine_jobs, "sweep_scratch", partial(scratch_files.sweep_scratch, older_than=-1))
    build(bundle)
    assert not any(path.exists() for path in scratch)
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)


def test_what_was_used_longest_ago_makes_room(
    bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {}
    for age, workspace in enumerate((64, 65, 66)):
        (result,) = build(bundle, workspace_mib=workspace)
        folder = cache / "engines" / result.sidecar.key
        sizes[workspace] = sum(path.stat().st_size for path in folder.iterdir())
        os.utime(folder / "entry.json", (1e9 - age, 1e9 - age))
    shutil.rmtree(bundle)
    monkeypatch.setenv(LIMIT_VARIABLE, str(2.5 * max(sizes.values()) / 1e9))
    (taken,) = build(make_bundle(bundle), workspace_mib=66)  # the oldest, which is now the one used last
    assert taken.status == FROM_CACHE
    shutil.rmtree(bundle)
    other = make_bundle(tmp_path / "other")
    (result,) = build(other, workspace_mib=67)
    assert len(result.notes) == 1
    assert result.notes[0].startswith("removed from the cache, to keep it small: vae_decoder fp16 for sm89")
    left = {path.name for path in entry_folders(cache)}
    assert left == {key(other, workspace) for workspace in (64, 66, 67)}
    check_files(other, load_manifest(other), load_manifest(other).files)


def test_a_limit_of_nothing_keeps_nothing(bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", partial(_refuse, 18))  # else it would take no room
    monkeypatch.setenv(LIMIT_VARIABLE, "0")
    (result,) = build(bundle)
    assert result.status == BUILT
    assert entry_folders(cache) == []


def key(bundle: Path, workspace: int) -> str:
    (result,) = build(bundle, workspace_mib=workspace)
    return result.sidecar.key


def test_the_limit_is_a_share_of_the_disk_or_what_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limit_bytes(tmp_path) == min(20 * 10**9, shutil.disk_usage(tmp_path).total // 10)
    monkeypatch.setenv(LIMIT_VARIABLE, "1.5")
    assert limit_bytes(tmp_path) == 1_500_000_000
    for text in ("many", "nan", "-1", "inf"):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        with pytest.raises(UsageError, match=f"{LIMIT_VARIABLE}: expected a number of GB"):
            limit_bytes(tmp_path)
