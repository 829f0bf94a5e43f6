from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.disk import with_disk
from latentrt.benchmarks.results_file import Disk, Row
from latentrt.runtime.manifest import Artifact, EngineRecord, Manifest, record_of, save_manifest

SIZES = {
    "unet/model.onnx": 10,
    "unet/model.onnx.data": 1000,
    "unet/model.fp32.cpu.onnx": 20,
    "unet/model.fp16.onnx": 500,
    "unet/model.fp16.cuda.onnx": 440,
    "vae_decoder/model.onnx": 300,
    "vae_decoder/model.fp16.onnx": 150,
    "unet/engines/a.engine": 700,
    "unet/engines/a.json": 7,
    "unet/engines/b.engine": 650,
    "unet/engines/b.json": 6,
    "model_index.json": 3,
}


def artifact(path: str, precision: str, *more: str, target: str = "") -> Artifact:
    return Artifact(
        component=path.split("/")[0],
        precision=precision,
        path=path,
        files=(path, *more),
        opset=20,
        key="",
        inputs={},
        parity={},
        parameters=1,
        target=target,
    )


def engine(name: str, flavour: str) -> EngineRecord:
    return EngineRecord(
        component="unet",
        precision="fp16",
        path=f"unet/engines/{name}.engine",
        sidecar=f"unet/engines/{name}.json",
        key=name,
        flavour=flavour,
        targets=("sm89",),
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of files that hold nothing but their sizes."""
    for name, size in SIZES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    data = "unet/model.onnx.data"
    manifest = Manifest(
        name="sizes",
        pipeline_class="StableDiffusionPipeline",
        latentrt_version="0",
        files={name: record_of(tmp_path / name) for name in SIZES},
        artifacts=(
            artifact("unet/model.onnx", "fp32", data),
            artifact("unet/model.fp32.cpu.onnx", "fp32", data, target="cpu"),
            artifact("unet/model.fp16.onnx", "fp16"),
            artifact("unet/model.fp16.cuda.onnx", "fp16", target="cuda"),
            artifact("vae_decoder/model.onnx", "fp32"),
            artifact("vae_decoder/model.fp16.onnx", "fp16"),
        ),
        engines=(engine("a", "tensorrt"), engine("b", "tensorrt_rtx")),
    )
    save_manifest(tmp_path, manifest)
    return tmp_path


def row(
    backend: str, *, system: System = "latentrt", skipped: str | None = None, on_gpu: bool = False, **precisions: str
) -> Row:
    case = Case(
        subject=Subject(system=system, precision="fp16", backend="auto", width=64, height=64, batch=1),
        settings=Settings(sampler="Euler", schedule=None, steps=1, guidance=1.0),
    )
    return Row(case=case, backend=backend, on_gpu=on_gpu, precisions=precisions, skipped=skipped)


def disk_of(found: Row, bundle: Path) -> Disk:
    disk = with_disk([found], bundle)[0].disk
    assert disk is not None
    return disk


def test_graphs_are_those_that_are_loaded(bundle: Path) -> None:
    whole = sum(SIZES.values()) + (bundle / "manifest.json").stat().st_size
    # The graph made for the CPU with the weights that it shares, and the plain one where there is no other.
    on_cpu = disk_of(row("onnxruntime CPU", unet="fp32", vae_decoder="fp32"), bundle)
    assert on_cpu == Disk(graphs=20 + 1000 + 300, engines=0, bundle=whole)
    half = disk_of(row("onnxruntime CPU", unet="fp16", vae_decoder="fp16"), bundle)
    assert half == Disk(graphs=500 + 150, engines=0, bundle=whole)
    # What the CPU's graph and the plain one share counts once, and on a GPU nothing of the CPU's.
    on_gpu = disk_of(row("onnxruntime CUDA", on_gpu=True, unet="fp32"), bundle)
    assert on_gpu.graphs == 10 + 1000
    assert disk_of(row("onnxruntime CUDA", on_gpu=True, unet="fp16"), bundle).graphs == 440


@pytest.mark.parametrize(("backend", "engines"), [("tensorrt", 707), ("tensorrt_rtx", 656)])
def test_engines_are_those_of_the_flavour_that_ran(backend: str, engines: int, bundle: Path) -> None:
    found = disk_of(row(f"{backend} on A GPU", on_gpu=True, unet="fp16", vae_decoder="fp32"), bundle)
    assert (found.graphs, found.engines) == (500 + 300, engines)
    assert disk_of(row(f"{backend} on A GPU", on_gpu=True, unet="fp32"), bundle).engines == 0


def test_peers_read_nothing_of_it_and_skipped_rows_nothing_at_all(bundle: Path) -> None:
    skipped = row("", skipped="no GPU")
    peer, same = with_disk([row("cpu", system="diffusers", all="fp32"), skipped], bundle)
    assert peer.disk == Disk(graphs=0, engines=0, bundle=0)
    assert same is skipped


def test_a_folder_without_a_manifest_has_one_graph_a_component(tmp_path: Path) -> None:
    for name in ("unet/model.onnx", "unet/model.onnx_data", "vae_decoder/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 100)
    found = disk_of(row("onnxruntime CPU", unet="unknown", vae_decoder="unknown"), tmp_path)
    assert found == Disk(graphs=300, engines=0, bundle=300)
