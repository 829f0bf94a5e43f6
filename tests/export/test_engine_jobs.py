from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_bundle import FLOAT, build_once, decoder_graph, make_bundle, put_graph, unet_graph

from latentrt.export import engine_jobs, engine_store, lora_bundle
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_builder import build_engine
from latentrt.export.engine_config import EngineConfig
from latentrt.export.engine_jobs import build_engines
from latentrt.export.engine_making import EngineJob
from latentrt.export.engine_memory import planned_vram
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.cli import main
from latentrt.runtime.engine_sidecar import ShapeProfile, read_sidecar
from latentrt.runtime.errors import ArtifactError, BuildError, UsageError
from latentrt.runtime.machine import Gpu, Machine, probe_machine
from latentrt.runtime.manifest import (
    Manifest,
    changed_inputs,
    check_files,
    load_manifest,
    record_of,
    sha256_of,
    update_manifest,
    write_scratch,
)

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

UNET = BuildOptions(target="sm89", components=("unet",), batch="1..4", size="64..128")
# The tests look at ahead-of-time builds, whatever the machine they run on has.
NO_GPU = Machine(packages=probe_machine().packages, why_no_gpu="tests build ahead of time", platform="linux_x86_64")


def build(bundle: Path, options: BuildOptions = UNET, **changes: Any) -> Any:
    return build_engines(bundle, dataclasses.replace(options, **changes), machine=NO_GPU)


def engine_files(bundle: Path) -> list[str]:
    return sorted(path.name for folder in bundle.glob("*/engines") for path in folder.iterdir())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines of one test are not taken over by the next."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_every_component_for_every_target_with_sidecars_and_hashes(bundle: Path) -> None:
    results = build(bundle, target="sm86,sm89+sm120", components=None)
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)
    assert {result.reason for result in results} == {None}  # none is compared with its neighbours
    made = [(r.sidecar.component, r.sidecar.targets) for r in results]
    assert sorted(made) == sorted((e.component, e.targets) for e in manifest.engines)
    assert len(made) == 6
    for record in manifest.engines:
        sidecar = read_sidecar(bundle / record.sidecar)
        assert sidecar in [r.sidecar for r in results]
        assert sidecar.engine_sha256 == sha256_of(bundle / record.path)
        assert sidecar.engine_bytes == (bundle / record.path).stat().st_size > 10_000
        assert sidecar.key.startswith(Path(record.path).stem)
        report = (bundle / record.path).with_name(str(sidecar.layer_report))
        assert report.name == f"{Path(record.path).stem}.layers.json"
        assert json.loads(report.read_text())
        assert report.relative_to(bundle).as_posix() in manifest.files
        assert sidecar.gpu_name is None
        assert sidecar.precisions.share("Half") == 1.0
        assert sidecar.activation_bytes is not None
        assert sidecar.activation_bytes > 0
        assert "engine inspector not run: no GPU" in sidecar.obtained["precisions"]


def test_the_figures_of_a_known_graph(bundle: Path) -> None:
    (result,) = build(bundle)
    sidecar = result.sidecar
    # conv_in 8x4x3x3, conv_out 4x8x3x3, to_k 64x8
    assert dict(sidecar.precisions.weights) == {"Half": 288 + 288 + 512}
    assert dict(sidecar.precisions.layers) == {"Half": 3}
    assert sidecar.weight_bytes is not None
    assert 2 * 1088 <= sidecar.weight_bytes < 2 * 1088 + 2048
    rows = 8
    assert sidecar.tensor_bytes == 4 * (2 * rows * 4 * 16 * 16 + rows + rows * 77 * 64)
    assert sidecar.profiles[0]["sample"] == ShapeProfile((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 16, 16))
    assert [tensor.dtype for tensor in (*sidecar.inputs, *sidecar.outputs)] == ["float32"] * 4


def test_planned_memory_shares_one_activation_block(bundle: Path) -> None:
    sidecars = [result.sidecar for result in build(bundle, components=None)]
    weights = sum((s.weight_bytes or 0) + (s.tensor_bytes or 0) for s in sidecars)
    assert planned_vram(sidecars) == {"sm89": weights + max(s.activation_bytes or 0 for s in sidecars)}
    unknown = dataclasses.replace(sidecars[0], activation_bytes=None)
    assert planned_vram([unknown, *sidecars[1:]]) == {"sm89": None}


def test_an_unchanged_engine_is_kept_and_a_change_is_named(bundle: Path) -> None:
    (first,) = build(bundle)
    stamp = (bundle / first.path).stat().st_mtime_ns
    (again,) = build(bundle)
    assert (again.built, again.sidecar) == (False, first.sidecar)
    assert (bundle / first.path).stat().st_mtime_ns == stamp
    (other,) = build(bundle, workspace_mib=64)
    assert (other.built, other.changed) == (True, ("options.workspace_mib",))
    (wider,) = build(bundle, batch="1..8")
    assert wider.changed == tuple(f"profiles.0.{n}.max" for n in ("encoder_hidden_states", "sample", "timestep"))
    assert len(load_manifest(bundle).engines) == 3
    (forced,) = build(bundle, force=True)
    assert (forced.built, forced.path) == (True, first.path)
    assert len(load_manifest(bundle).engines) == 3


def test_a_new_graph_is_built_and_the_engine_of_the_old_one_goes(bundle: Path) -> None:
    (first,) = build(bundle)
    (decoder,) = build(bundle, components=("vae_decoder",))
    update_manifest(bundle, lambda manifest: put_graph(bundle, "unet", "fp16", unet_graph(seed=1), manifest))
    (second,) = build(bundle)
    assert second.changed == ("onnx.unet/model.fp16.onnx",)
    assert second.dropped == (first.path,)
    assert engine_files(bundle) == sorted(
        Path(path).with_suffix(suffix).name
        for path in (second.path, decoder.path)
        for suffix in (".engine", ".json", ".layers.json")
    )
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _edit, Path.unlink])
@pytest.mark.parametrize("suffix", [".engine", ".json", ".layers.json"])
def test_a_damaged_engine_is_reported_by_verify_and_built_again(
    bundle: Path,
    suffix: str,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build_once(monkeypatch)
    options = dataclasses.replace(UNET, components=("vae_decoder",), cache="off")
    (first,) = build(bundle, options)
    path = (bundle / first.path).with_suffix(suffix)
    damage(path)
    assert main(["verify", str(bundle), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith(f"{path}: expected ")
    (again,) = build(bundle, options)
    assert (again.built, again.changed) == (True, (problem,))
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)


def test_what_an_older_latentrt_built_is_kept_and_read(bundle: Path) -> None:
    """A sidecar of version 1, and no layer report."""
    (first,) = build(bundle)
    path = bundle / first.path
    old = json.loads(path.with_suffix(".json").read_text())
    old |= {"sidecar_version": 1, "profiles": old["profiles"][0]}
    for name in ("layer_report", "attempts", "flops", "refit", "refittable", "stripped", "compatibility"):
        del old[name]
    path.with_suffix(".layers.json").unlink()
    path.with_suffix(".json").write_text(json.dumps(old))

    def change(manifest: Manifest) -> Manifest:
        files = {name: file for name, file in manifest.files.items() if not name.endswith(".layers.json")}
        side = first.path.replace(".engine", ".json")
        return dataclasses.replace(manifest, files={**files, side: record_of(bundle / side)})

    update_manifest(bundle, change)
    (again,) = build(bundle)
    assert not again.built
    assert again.sidecar.profiles == first.sidecar.profiles
    assert again.sidecar.layer_report is None


def test_a_changed_byte_in_the_graph_is_named_before_anything_is_built(bundle: Path) -> None:
    path = bundle / "unet/model.fp16.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"unet/model\.fp16\.onnx: expected SHA-256"):
        build(bundle)
    assert engine_files(bundle) == []


def test_a_float_graph_called_fp16_fails_with_its_shares(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", unet=unet_graph(inner=FLOAT))
    with pytest.raises(BuildError, match=r"unet: expected an fp16 engine .*90%.* got Float 100\.0%"):
        build(bundle)
    assert engine_files(bundle) == []


def test_a_mixed_graph_takes_the_place_of_an_fp16_one_that_would_overflow(bundle: Path) -> None:
    def change(manifest: Manifest) -> Manifest:
        kept = tuple(graph for graph in manifest.artifacts if graph.component != "vae_decoder")
        return put_graph(bundle, "vae_decoder", "mixed", decoder_graph(), dataclasses.replace(manifest, artifacts=kept))

    update_manifest(bundle, change)
    results = build(bundle, components=None)
    found = {result.sidecar.component: result.sidecar.precision for result in results}
    assert found == {"text_encoder": "fp16", "unet": "fp16", "vae_decoder": "mixed"}
    decoder = next(result for result in results if result.sidecar.component == "vae_decoder")
    assert list(decoder.sidecar.onnx) == ["vae_decoder/model.mixed.onnx"]
    assert {engine.component: engine.precision for engine in load_manifest(bundle).engines} == found
    assert not any(result.built for result in build(bundle, components=None))


def test_graphs_beside_those_of_text_to_image_are_built_only_when_asked_for(bundle: Path) -> None:
    others = ("safety_checker", "unet_prompt", "vae_decoder_uint8", "vae_encoder")
    for name in others:
        update_manifest(bundle, partial(put_graph, bundle, name, "fp16", decoder_graph()))
    results = build(bundle, components=None)
    assert [result.sidecar.component for result in results] == ["text_encoder", "unet", "vae_decoder"]
    with pytest.raises(UsageError, match=f"found .*{', '.join(others)}"):
        build(bundle, components=("taesd_decoder",))


def planned(bundle: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, EngineJob]:
    """The jobs of a build that is not run, by component."""
    jobs: list[EngineJob] = []
    with monkeypatch.context() as patch:
        patch.setattr(engine_jobs, "make_engine", lambda shop, job, asked: jobs.append(job))
        patch.setattr(engine_jobs, "check_supported", lambda trt, config: None)
        build(bundle, components=None, **changes)
    return {job.config.component: job for job in jobs}


def test_every_option_reaches_the_config_and_the_key(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = planned(bundle, monkeypatch)["unet"]
    options: dict[str, Any] = {
        "workspace_mib": 64,
        "optimization_level": 1,
        "version_compatible": True,
        "hardware_compatibility": "ampere_plus",
        "tiling": "fast",
        "weight_streaming": True,
        "narrow": True,
        "strip": True,
        "refit": "all",
    }
    for name, value in options.items():
        job = planned(bundle, monkeypatch, **{name: value})["unet"]
        assert getattr(job.config, name) == value
        assert job.key != plain.key
    other = planned(bundle, monkeypatch, timing_cache=str(bundle / "timings"))["unet"]
    assert (other.config.timing_cache, other.key) == (bundle / "timings", plain.key)
    with monkeypatch.context() as patch:
        patch.setattr(engine_jobs, "BUILDER_REVISION", 99)
        assert planned(bundle, monkeypatch)["unet"].key != plain.key


def test_refit_for_loras_is_of_the_weights_that_they_change(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = {"unet": ("to_k.weight",)}
    monkeypatch.setattr(lora_bundle, "lora_targets", lambda opened, component, precision: targets.get(component, ()))
    jobs = planned(bundle, monkeypatch, refit="lora")
    assert {name: (job.config.refit, job.config.refittable) for name, job in jobs.items()} == {
        "text_encoder": ("none", ()),
        "unet": ("individual", ("to_k.weight",)),
        "vae_decoder": ("none", ()),
    }
    with pytest.raises(UsageError, match="refit: expected none, lora or all, got 'individual'"):
        build(bundle, refit="individual")


def test_full_tensorrts_engines_belong_to_one_model_of_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(__name__="tensorrt", __version__="11.4.0.17")
    monkeypatch.setattr(engine_jobs, "choose_flavour", lambda *_: ("tensorrt", library))
    jobs = []
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        gpu = Gpu(name, "sm90", 10**11)
        monkeypatch.setattr(sys.modules[__name__], "NO_GPU", Machine(gpus=(gpu,), platform="linux_x86_64"))
        jobs.append(planned(bundle, monkeypatch, target="sm90")["unet"])
    assert changed_inputs(jobs[0].made_from, jobs[1].made_from) == ["gpu_name"]
    assert [path.name for job in jobs if (path := job.config.timing_cache)] == [
        "11.4.0.17-NVIDIA-H200.bin",
        "11.4.0.17-NVIDIA-H100-80GB-HBM3.bin",
    ]
    assert planned(bundle, monkeypatch, target="sm90", timing_cache="off")["unet"].config.timing_cache is None


def test_what_the_parser_refuses_is_said_with_the_node(tmp_path: Path) -> None:
    model = unet_graph()
    next(node for node in model.graph.node if node.name == "scale_by_time").op_type = "NoSuchOperator"
    with pytest.raises(BuildError, match=r"unet: the parser refused .*NoSuchOperator"):
        build(make_bundle(tmp_path / "bundle", unet=model))


def test_mixed_types_are_refused_before_the_parser(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="Add node 'add_text' mixes"):
        build(make_bundle(tmp_path / "bundle", unet=unet_graph(mixed=True)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "int8"}, "expected unet in int8, found fp16. Run: latentrt calibrate"),
        # Not the text encoder alone, which would take part in half precision.
        ({"precision": "int8", "components": None}, "expected unet in int8, found fp16. Run: latentrt calibrate"),
        ({"precision": "fp32", "components": None}, "expected graphs in fp32, found fp16. Run: latentrt export"),
        ({"components": ("controlnet",)}, "expected controlnet in fp16, found text_encoder, unet, vae_decoder"),
        ({"size": "60"}, "multiples of 8"),
        ({"batch": "0"}, "rising numbers from 1"),
        ({"target": "sm90"}, "expected one of sm75"),
        ({"target": "current"}, "tests build ahead of time"),
        ({"workspace_mib": 0}, "at least 1 MiB"),
        ({"flavour": "trt"}, "expected auto, tensorrt or tensorrt_rtx"),
    ],
)
def test_requests_that_cannot_be_are_usage_errors(bundle: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(bundle, **changes)
    assert said in str(caught.value)


def test_a_full_disk_names_the_file_and_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(self, mode, *args, **kwargs)
        if ".engine." in self.name:
            stream.close()
            return Full()
        return stream

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="No space left") as caught:
        build(bundle)
    assert str(caught.value.filename).endswith(".engine")
    assert engine_files(bundle) == []
    assert load_manifest(bundle).engines == ()


def test_a_failure_while_the_manifest_is_written_leaves_no_engine_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, change: Any) -> None:
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(engine_store, "update_manifest", refuse)
    with pytest.raises(PermissionError):
        build(bundle)
    assert engine_files(bundle) == []


def test_a_graph_exported_during_the_build_is_noticed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = write_scratch

    def export_meanwhile(final: Path, data: Any) -> Any:
        if final.suffix == ".engine":
            update_manifest(bundle, lambda manifest: put_graph(bundle, "unet", "fp16", unet_graph(seed=2), manifest))
        return original(final, data)

    monkeypatch.setattr("latentrt.export.engine_store.write_scratch", export_meanwhile)
    with pytest.raises(BuildError, match="got one exported since"):
        build(bundle)
    assert engine_files(bundle) == []


def test_an_interrupt_during_the_build_leaves_nothing(bundle: Path) -> None:
    seen: list[str] = []

    def progress(title: str) -> Callable[[str, float], None]:
        def step(phase: str, part: float) -> None:
            seen.append(phase)
            if len(seen) == 3:
                interrupt_main()
            if len(seen) >= 3:
                time.sleep(0.5)  # gives the main thread, which may have to wait for a core, time to see it

        return step

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, UNET, machine=NO_GPU, progress=progress)
    assert 3 <= len(seen) < 30  # of about 60
    assert engine_files(bundle) == []
    assert load_manifest(bundle).engines == ()
    (result,) = build(bundle)
    assert result.built


def test_progress_rises_to_the_end(bundle: Path) -> None:
    parts: list[float] = []
    titles: list[str] = []

    def progress(title: str) -> Callable[[str, float], None]:
        titles.append(title)
        return lambda phase, part: parts.append(part)

    build_engines(bundle, UNET, machine=NO_GPU, progress=progress)
    assert titles == ["unet fp16 sm89"]
    assert parts == sorted(parts)
    assert parts[-1] == 1.0


def test_two_processes_at_once_lose_no_engine(bundle: Path) -> None:
    words = ["build", str(bundle), "--components", "unet", "--size", "64", "--json", "--target"]
    program = "import sys; from latentrt.runtime.cli import main; sys.exit(main(sys.argv[1:]))"
    runs = [
        subprocess.Popen([sys.executable, "-c", program, *words, target], stdout=subprocess.PIPE, text=True)
        for target in ("sm86,sm89", "sm89,sm120")
    ]
    reports = [json.loads(run.communicate(timeout=120)[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], reports
    manifest = load_manifest(bundle)
    assert {engine.targets for engine in manifest.engines} == {("sm86",), ("sm89",), ("sm120",)}
    assert len(manifest.engines) == 3
    check_files(bundle, manifest, manifest.files)


def test_threads_of_one_process_may_build_too(bundle: Path) -> None:
    failures: list[BaseException] = []

    def work(target: str) -> None:
        try:
            build(bundle, target=target)
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=work, args=(target,)) for target in ("sm86", "sm89")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(load_manifest(bundle).engines) == 2


def test_a_builder_that_fails_gives_its_log(bundle: Path) -> None:
    import tensorrt_rtx

    profiles = {"sample": ShapeProfile((1, 4, 8, 8), (1, 4, 8, 8), (1, 4, 8, 8))}
    with pytest.raises(BuildError, match=r"unet: the builder .*timestep"):
        build_engine(
            tensorrt_rtx, bundle / "unet/model.fp16.onnx", EngineConfig("unet", "fp16", (profiles,), ("sm89",))
        )
