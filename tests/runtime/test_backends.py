from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from latentrt.runtime import backends, onnx_cuda
from latentrt.runtime.backends import choose_graph, open_session
from latentrt.runtime.bundle import Bundle, open_bundle, pipeline_files
from latentrt.runtime.components import Components
from latentrt.runtime.doctor import examine
from latentrt.runtime.errors import ArtifactError, BackendError, UsageError
from latentrt.runtime.manifest import Artifact, Manifest, load_manifest, record_of, save_manifest
from latentrt.runtime.onnx_cuda import CudaOptions

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
GRAPH = '<ir_version: 10, opset_import: ["" : 20]> g (float[b, 2] {name}) => (float[b, 2] y) {{ y = Identity({name}) }}'


def artifact(component: str, precision: str, path: str, target: str = "") -> Artifact:
    return Artifact(component, precision, path, (path,), 20, "key", {}, {"worst_relative_l2": 0.0}, 0, target)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Graphs whose inputs are called what they are for."""
    artifacts = []
    for component in COMPONENTS:
        for precision, target, name in (
            ("fp32", "", "model.onnx"),
            ("fp32", "cpu", "model.fp32.cpu.onnx"),
            ("fp16", "", "model.fp16.onnx"),
            ("fp16", "cuda", "model.fp16.cuda.onnx"),
        ):
            path = tmp_path / component / name
            path.parent.mkdir(exist_ok=True)
            onnx.save_model(onnx.parser.parse_model(GRAPH.format(name=target or "plain")), path)
            artifacts.append(artifact(component, precision, f"{component}/{name}", target))
    files = {a.path: record_of(tmp_path / a.path) for a in artifacts}
    save_manifest(tmp_path, Manifest("tiny", "StableDiffusionPipeline", "0", files=files, artifacts=tuple(artifacts)))
    return tmp_path


def graph_of(bundle: Path, precision: str, backend: str) -> str:
    return open_session(open_bundle(bundle), "unet", precision, backend=backend).spec.inputs[0].name


def test_the_cpu_takes_the_graph_made_for_it(bundle: Path) -> None:
    assert graph_of(bundle, "fp32", "onnxruntime") == "cpu"
    assert choose_graph(open_bundle(bundle), "unet", "fp32", backend="onnxruntime").reason == "made for onnxruntime CPU"


def test_without_one_it_takes_the_graph_for_every_runtime(bundle: Path) -> None:
    assert graph_of(bundle, "fp16", "onnxruntime") == "plain"
    choice = choose_graph(open_bundle(bundle), "unet", "fp16", backend="onnxruntime")
    assert choice.reason == "for every runtime: the bundle holds none made for onnxruntime CPU in fp16"


def test_cuda_takes_its_own(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(backends, "why_no_cuda", lambda: None)
    monkeypatch.setattr(backends, "OnnxSession", lambda path, **given: opened.append((path.name, given)))
    large = CudaOptions(gives_back=False)
    for component, cuda in (("unet", None), ("vae_decoder", None), ("vae_decoder", large)):
        open_session(open_bundle(bundle), component, "fp16", backend="cuda", cuda=cuda)
    assert [name for name, _ in opened] == ["model.fp16.cuda.onnx"] * 3
    assert {given["providers"] for _, given in opened} == {("CUDAExecutionProvider", "CPUExecutionProvider")}
    assert [given["arena"] for _, given in opened] == [True, False, True], "what runs once gives its memory back"
    choice = choose_graph(open_bundle(bundle), "unet", "fp32", backend="cuda")
    assert choice.target == ""
    assert choice.reason.endswith(f"Run: latentrt optimize {bundle} --target cuda")


def test_a_gpu_that_cannot_be_used_is_an_error_if_it_was_asked_for(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a remark if it was not."""
    why = "the CUDA provider is installed, but no NVIDIA driver: libcuda.so.1 is not installed"
    for module in (backends, onnx_cuda):
        monkeypatch.setattr(module, "why_no_cuda", lambda: why)
    monkeypatch.setattr(onnx_cuda, "PROVIDER", "CPUExecutionProvider")  # as if this build had it
    with pytest.raises(BackendError, match=f"backend cuda: expected a GPU that ONNX Runtime can use, but {why}"):
        open_session(open_bundle(bundle), "unet", "fp16", backend="cuda")
    components = Components(open_bundle(bundle), "fp32", backend="auto")
    assert components["unet"].backend == "onnxruntime CPU"
    assert components.notes() == (f"onnxruntime runs on the CPU: {why}",)
    asked = Components(open_bundle(bundle), "fp32", backend="onnxruntime")
    assert asked["unet"].backend == "onnxruntime CPU"
    assert asked.notes() == ()


def test_a_folder_without_a_manifest_holds_one_graph(bundle: Path) -> None:
    assert choose_graph(Bundle(bundle, None), "unet", "fp32").target == ""


def test_what_is_loaded_is_what_is_checked(bundle: Path) -> None:
    assert pipeline_files(open_bundle(bundle), "fp32", ["unet"], "cpu") == ["unet/model.fp32.cpu.onnx"]
    target, plain = bundle / "unet/model.fp32.cpu.onnx", bundle / "unet/model.onnx"
    plain.write_bytes(plain.read_bytes()[::-1])
    Components(open_bundle(bundle), "fp32", backend="onnxruntime")["unet"]
    target.write_bytes(target.read_bytes()[::-1])
    with pytest.raises(ArtifactError, match=re.escape(str(target))):
        Components(open_bundle(bundle), "fp32", backend="onnxruntime")["unet"]


def test_graphs_of_targets_are_no_precision_of_their_own(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    only_cuda = [a for a in manifest.artifacts if a.precision == "fp32" or a.target]
    save_manifest(bundle, dataclasses.replace(manifest, artifacts=tuple(only_cuda)))
    opened = open_bundle(bundle)
    assert opened.held("unet") == ["fp32"]
    with pytest.raises(UsageError, match=r"expected unet in fp16, found \['fp32'\]"):
        opened.graph("unet", "fp16")


def test_a_manifest_from_before_targets_loads(bundle: Path) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    content["artifacts"] = [a for a in content["artifacts"] if not a.pop("target")]
    path.write_text(json.dumps(content))
    manifest = load_manifest(bundle)
    assert {a.target for a in manifest.artifacts} == {""}
    assert manifest.artifact("unet", "fp32") == artifact("unet", "fp32", "unet/model.onnx")


def test_doctor_says_which_graph_and_why(bundle: Path) -> None:
    graphs = {(graph.component, graph.precision): graph for graph in examine(bundle).graphs}
    assert len(graphs) == 2 * len(COMPONENTS)
    assert graphs["unet", "fp32"].path == "unet/model.fp32.cpu.onnx"
    assert graphs["unet", "fp16"].path == "unet/model.fp16.onnx"
    assert "made for onnxruntime CPU" in graphs["unet", "fp32"].reason
