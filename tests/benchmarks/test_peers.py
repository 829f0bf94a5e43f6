"""Which peers can run and why not, and their settings, whose steps and options are held against latentrt's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.benchmarks import peer_handlers, peers
from latentrt.benchmarks.cases import PEERS, Model, Settings, Subject
from latentrt.benchmarks.peers import checkpoint_of, peer_settings, why_not, worker_of
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Machine
from latentrt.runtime.manifest import Manifest
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler
from latentrt.runtime.sampler_spec import TIMESTEP_SPACINGS
from latentrt.runtime.sampling_plan import plan_sampling

SUBJECT = Subject(system="diffusers", precision="fp32", backend="cpu", width=64, height=64, batch=1)
OPTIMUM = replace(SUBJECT, system="optimum")
SETTINGS = Settings(sampler="DPM++ 2M", schedule="karras", steps=7, guidance=5.0)
HAS_OPTIMUM = peers._has_optimum
CONFIG: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "examples" / "shapes" / "scheduler" / "scheduler_config.json").read_text()
)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model that all peers can open: files of the names that they look for."""
    (tmp_path / "checkpoint").mkdir()
    bundle = tmp_path / "x.bundle"
    for name in ("text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/model.onnx", "tokenizer/vocab.json"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).touch()
    (bundle / "tokenizer" / "merges.txt").touch()
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (bundle / "model_index.json").write_text(json.dumps(index))
    return Model(bundle=str(bundle), checkpoint=str(tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def everything_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_has_optimum", lambda _: True)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(peers, "probe_machine", lambda: Machine())
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0")


@pytest.mark.parametrize("system", PEERS)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_peer_with_all_that_it_needs_runs(model: Model, system: Any, backend: str) -> None:
    assert why_not(replace(SUBJECT, system=system, backend=backend), model) is None


@pytest.mark.parametrize("system", PEERS)
@pytest.mark.parametrize("precision", ["int8", "fp8", "int8w", "mixed"])
def test_peers_have_no_quantized_networks(model: Model, system: Any, precision: str) -> None:
    subject = replace(SUBJECT, system=system, precision=precision, backend="cuda")
    assert why_not(subject, model) == f"{system} has no {precision}"


def test_half_precision_is_for_gpus(model: Model) -> None:
    half = replace(SUBJECT, precision="fp16")
    assert why_not(half, model) == "diffusers draws in fp32 on a CPU"
    assert why_not(replace(half, backend="cuda"), model) is None


def test_optimum_needs_graphs_of_its_own_for_half_precision(model: Model) -> None:
    half = replace(OPTIMUM, precision="fp16", backend="cuda")
    assert "give --optimum-model" in str(why_not(half, model))
    assert why_not(half, replace(model, optimum_model=model.bundle)) is None


@pytest.mark.parametrize("system", PEERS)
def test_a_gpu_that_is_not_there(model: Model, monkeypatch: pytest.MonkeyPatch, system: Any) -> None:
    monkeypatch.setattr(peers, "probe_machine", lambda: Machine(why_no_gpu="no NVIDIA driver"))
    assert why_not(replace(SUBJECT, system=system, backend="cuda"), model) == "no GPU: no NVIDIA driver"
    assert why_not(replace(SUBJECT, system=system), model) is None


@pytest.mark.parametrize("missing", ["torch", "diffusers", "transformers"])
def test_a_library_that_is_not_installed(model: Model, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    assert why_not(SUBJECT, model) == f"{missing} is not installed; run: pip install 'latentrt[export]'"
    # optimum's are in its own environment.
    assert why_not(OPTIMUM, model) is None


def test_a_checkpoint_that_is_not_at_hand(model: Model) -> None:
    assert why_not(SUBJECT, replace(model, checkpoint=None)) == (
        "the checkpoint of x.bundle is not at hand; give --checkpoint"
    )
    assert why_not(SUBJECT, replace(model, checkpoint="/no/such")) == "there is no checkpoint /no/such"
    assert why_not(OPTIMUM, replace(model, checkpoint=None)) is None


def test_pytorch_without_cuda(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: "2.13.0+cpu")
    assert why_not(replace(SUBJECT, backend="cuda"), model) == "PyTorch 2.13.0+cpu is built without CUDA"
    assert why_not(SUBJECT, model) is None


def test_a_compiler_that_is_missing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = replace(SUBJECT, system="torch-compile")
    monkeypatch.setattr("shutil.which", lambda name: "/opt/clang++" if name == "clang++" else None)
    assert why_not(compiled, model) is None
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "needs a C++ compiler" in str(why_not(compiled, model))
    assert why_not(replace(compiled, backend="cuda"), model) is None
    assert why_not(SUBJECT, model) is None


def test_optimum_that_is_not_installed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(peers, "_has_optimum", asked.append)
    assert why_not(OPTIMUM, model) == (
        f"optimum-onnx is not installed for {sys.executable}; give --optimum-python, an environment with it"
    )
    other = replace(model, optimum_python="/venv/bin/python")
    assert why_not(OPTIMUM, other) == "optimum-onnx is not installed for /venv/bin/python"
    assert asked == [sys.executable, "/venv/bin/python"]


@pytest.mark.parametrize("gone", ["unet/model.onnx", "text_encoder/model.onnx", "tokenizer/vocab.json"])
def test_a_bundle_that_optimum_cannot_open(model: Model, gone: str) -> None:
    (Path(model.bundle) / gone).unlink()
    assert why_not(OPTIMUM, model) == f"optimum opens what x.bundle does not have: {gone}"
    assert why_not(SUBJECT, model) is None


def test_a_folder_that_is_no_pipeline(model: Model) -> None:
    (Path(model.bundle) / "model_index.json").unlink()
    assert "model_index.json: expected a config file" in str(why_not(OPTIMUM, model))


def test_an_interpreter_is_asked_for_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not HAS_OPTIMUM(str(tmp_path / "no-python"))
    # Without the packages of this environment.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bare, full = tmp_path / "bare", tmp_path / "full"
    for python in (bare, full):
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
    assert not HAS_OPTIMUM(str(bare))
    (tmp_path / "optimum" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "optimum" / "onnxruntime" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "onnxruntime.py").touch()
    assert HAS_OPTIMUM(str(full))


def test_the_process_of_a_peer() -> None:
    model = Model(bundle="x.bundle", optimum_python="/venv/bin/python")
    assert worker_of(OPTIMUM, model) == ("/venv/bin/python", peer_handlers.__file__)
    assert worker_of(OPTIMUM, replace(model, optimum_python=None))[0] == sys.executable
    assert worker_of(SUBJECT, model)[0] == sys.executable


def test_settings_go_to_the_process_as_they_are() -> None:
    found = peer_settings(replace(SETTINGS, guidance=1.0))
    assert json.loads(json.dumps(found)) == {**found, "guidance_interval": [0.0, 1.0]}
    assert (found["steps"], found["guidance"], found["scheduler"]["class"]) == (7, 1.0, "DPMSolverMultistepScheduler")
    # One of these at most is taken by diffusers, and a config may have another.
    assert found["scheduler"]["options"] == {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_flow_sigmas": False,
    }


def test_the_own_sampler_keeps_the_checkpoints_options() -> None:
    wanted = peer_settings(replace(SETTINGS, sampler="PNDMScheduler", schedule=None))["scheduler"]
    own = diffusers.PNDMScheduler.from_config(CONFIG)
    assert wanted["options"] == {}
    assert dict(peer_handlers._scheduler(own, wanted).config) == dict(own.config)


@pytest.mark.parametrize("sampler", ["Restart", "DPM++ 3M SDE", "DPM fast"])
def test_a_sampler_that_diffusers_does_not_have(sampler: str) -> None:
    with pytest.raises(UsageError, match=rf"expected one that diffusers has, got {re.escape(sampler)}"):
        peer_settings(replace(SETTINGS, sampler=sampler, schedule=None))


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("DPM++ 2M", "ays"), ("Euler", "sgm_uniform"), ("DDIM", "karras"), ("DPM++ 2S", "trailing")],
)
def test_a_schedule_that_diffusers_does_not_have(sampler: str, schedule: str) -> None:
    with pytest.raises(UsageError, match=rf"one that diffusers has for {re.escape(sampler)}, got {schedule}"):
        peer_settings(replace(SETTINGS, sampler=sampler, schedule=schedule))


def test_guidance_within_an_interval() -> None:
    with pytest.raises(UsageError, match=r"expected 0 to 1 for peers, got 0\.2 to 0\.8"):
        peer_settings(replace(SETTINGS, guidance_interval=(0.2, 0.8)))


# Which levels a sampler visits by its class's options, for all that go with this checkpoint: those of EDM and of flows
# do not, and DPM-Solver ends where diffusers refuses to.
_COMPARED = [
    (spec.label, schedule)
    for spec in SAMPLERS
    if spec.scheduler is not None and spec.space in ("vp", "ve") and not spec.name.startswith(("dpm_solver", "iplms"))
    for schedule in (None, "leading", "linspace", "trailing", "karras", "exponential", "beta")
    if schedule is None
    or {"timestep_spacing" if schedule in TIMESTEP_SPACINGS else f"use_{schedule}_sigmas"} & spec.reads
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("label", "schedule"), _COMPARED)
def test_a_scheduler_steps_and_solves_as_latentrts_sampler(label: str, schedule: str | None) -> None:
    wanted = peer_settings(replace(SETTINGS, sampler=label, schedule=schedule))["scheduler"]
    scheduler = peer_handlers._scheduler(diffusers.PNDMScheduler.from_config(CONFIG), wanted)
    scheduler.set_timesteps(SETTINGS.steps)
    plan = plan_sampling(NoiseSchedule.from_config(CONFIG), resolve_sampler(label), SETTINGS.steps, spacing=schedule)
    # Solvers of second order tell the model twice where it is, but at the last step.
    timesteps = scheduler.timesteps[:: scheduler.order].tolist()
    np.testing.assert_allclose(timesteps, [step.timestep for step in plan.steps], rtol=0, atol=1e-2)
    read = {name: value for name, value in plan.options.items() if name in scheduler.config}
    # diffusers sets this itself where the last level is zero, which is where latentrt's solver does the same.
    read.pop("lower_order_final", None)
    assert {name: scheduler.config[name] for name in read} == read


def bundle_of(folder: Path, source: dict[str, Any]) -> Bundle:
    manifest = Manifest(name="x", pipeline_class="", latentrt_version="", source=source)
    return Bundle(path=folder / "x.bundle", manifest=manifest)


def sources(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Files with their names for content, and their SHA-256."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


FILES = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json")


def test_the_checkpoint_of_a_bundle_is_found_beside_it_and_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources(tmp_path / "x", FILES)
    bundle = bundle_of(tmp_path, {**source, "controlnet/config.json": "of another folder"})
    assert checkpoint_of(bundle) == tmp_path / "x"
    elsewhere = replace(bundle, path=tmp_path / "far" / "x.bundle")
    assert checkpoint_of(elsewhere) is None
    monkeypatch.chdir(tmp_path)
    assert checkpoint_of(elsewhere) == tmp_path / "x"


def test_a_checkpoint_that_was_changed_is_not_taken(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, sources(tmp_path / "x", FILES))
    (tmp_path / "x" / "unet" / "config.json").write_text("another")
    assert checkpoint_of(bundle) is None


def test_a_single_file_is_known_by_its_hash(tmp_path: Path) -> None:
    digest = sources(tmp_path, ("x.safetensors",))["x.safetensors"]
    source = {"unet/x.safetensors": digest, "vae/x.safetensors": digest, "unet/config.json": "of a folder of configs"}
    assert checkpoint_of(bundle_of(tmp_path, source)) == tmp_path / "x.safetensors"
    (tmp_path / "x.safetensors").write_text("another")
    assert checkpoint_of(bundle_of(tmp_path, source)) is None


def test_what_was_folded_in_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    source = sources(tmp_path / "x", FILES)
    assert checkpoint_of(bundle_of(tmp_path, {**source, "unet/changes": "a LoRA"})) is None
    assert checkpoint_of(bundle_of(tmp_path, {**source, "taesd/changes": "not drawn with"})) == tmp_path / "x"


def test_a_commit_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--owner--x"
    snapshot = repository / "snapshots" / ("0" * 40)
    source = {**sources(snapshot, FILES), "hub": {"repo_id": "owner/x", "commit": "0" * 40}}
    (snapshot / "model_index.json").touch()
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    bundle = bundle_of(tmp_path / "bundles", source)
    assert checkpoint_of(bundle) == snapshot
    (snapshot / FILES[1]).unlink()
    assert checkpoint_of(bundle) is None


def test_a_folder_of_optimum_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_of(Bundle(path=tmp_path, manifest=None)) is None
