"""Which peers can run here, what they need for it, and how they are told to draw as latentrt does."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import Bundle, read_config
from latentrt.runtime.errors import LatentrtError, UsageError
from latentrt.runtime.machine import probe_machine
from latentrt.runtime.manifest import sha256_of
from latentrt.runtime.sampler_names import resolve_sampler, resolve_schedule
from latentrt.runtime.sampler_spec import TIMESTEP_SPACINGS, SamplerSpec

from .cases import Model, Settings, Subject

HANDLERS = Path(__file__).with_name("peer_handlers.py")
# That draw a picture from a prompt, as checkpoints name them.
_NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
_COMPILERS = ("c++", "g++", "clang++")
# find_spec of a module imports the packages that it is in, of which optimum's is empty.
_FIND = "import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))"


def why_not(subject: Subject, model: Model) -> str | None:
    """Why a peer cannot run here; None if it can, as far as can be told without loading it."""
    on_gpu = subject.backend == "cuda"
    if reason := _why_not_precision(subject, model):
        return reason
    if on_gpu and (reason := probe_machine().why_no_gpu):
        return f"no GPU: {reason}"
    if subject.system == "optimum":
        return _why_not_optimum(model)
    return _why_not_torch(subject, model)


def _why_not_precision(subject: Subject, model: Model) -> str | None:
    if subject.precision == "fp16" and subject.backend == "cpu":
        return f"{subject.system} draws in fp32 on a CPU"
    if subject.precision not in ("fp32", "fp16"):
        return f"{subject.system} has no {subject.precision}"
    if subject.system == "optimum" and subject.precision == "fp16" and model.optimum_model is None:
        return "a bundle's model.onnx, which optimum opens, is in fp32; give --optimum-model, a folder in fp16"
    return None


def _why_not_torch(subject: Subject, model: Model) -> str | None:
    for package in ("torch", "diffusers", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run: pip install 'latentrt[export]'"
    if model.checkpoint is None:
        return f"the checkpoint of {Path(model.bundle).name} is not at hand; give --checkpoint"
    if not Path(model.checkpoint).exists():
        return f"there is no checkpoint {model.checkpoint}"
    if subject.backend == "cuda" and "+cpu" in (version := metadata.version("torch")):
        return f"PyTorch {version} is built without CUDA"
    if subject.system == "torch-compile" and subject.backend == "cpu" and not any(map(shutil.which, _COMPILERS)):
        return f"torch.compile needs a C++ compiler on a CPU, and there is none of {', '.join(_COMPILERS)}"
    return None


def _why_not_optimum(model: Model) -> str | None:
    python = model.optimum_python or sys.executable
    if not _has_optimum(python):
        given = "" if model.optimum_python else "; give --optimum-python, an environment with it"
        return f"optimum-onnx is not installed for {python}{given}"
    folder = Path(model.optimum_model or model.bundle)
    try:
        index = read_config(folder / "model_index.json")
    except LatentrtError as err:
        return str(err)
    texts = [name for name in ("text_encoder", "text_encoder_2") if _has(index, name)]
    graphs = [f"{name}/model.onnx" for name in (*texts, "unet", "vae_decoder")]
    tokenizers = [name for name in ("tokenizer", "tokenizer_2") if _has(index, name)]
    # transformers 4 reads these, not the one file that transformers 5 writes.
    files = [f"{name}/{file}" for name in tokenizers for file in ("vocab.json", "merges.txt")]
    missing = [name for name in (*graphs, *files) if not (folder / name).exists()]
    return f"optimum opens what {folder.name} does not have: {', '.join(missing)}" if missing else None


def _has(index: Mapping[str, Any], name: str) -> bool:
    return bool((index.get(name) or [None])[0])


@functools.cache
def _has_optimum(python: str) -> bool:
    try:
        found = subprocess.run([python, "-c", _FIND, "optimum.onnxruntime", "onnxruntime"], capture_output=True)
    except OSError:
        return False
    return found.returncode == 0


def worker_of(subject: Subject, model: Model) -> tuple[str, str]:
    """The interpreter and the handlers of a peer's process, for `open_worker`."""
    python = model.optimum_python if subject.system == "optimum" else None
    return python or sys.executable, str(HANDLERS)


def peer_settings(settings: Settings) -> dict[str, Any]:
    """The settings as `peer_handlers` takes them: with diffusers' scheduler, its class, options and defaults.

    `defaults` are latentrt's where the checkpoint is of another class and its config silent: diffusers' class may have
    others, such as DDIM's clipping of what is denoised.

    Raises:
        UsageError: diffusers has no such sampler, schedule or guidance interval.
    """
    if settings.guidance_interval != (0.0, 1.0):
        start, end = settings.guidance_interval
        raise UsageError(
            f"guidance interval: expected 0 to 1 for peers, got {start:g} to {end:g}. "
            "Pipelines of diffusers guide every step or none."
        )
    spec = resolve_sampler(settings.sampler)
    if spec.scheduler is None:
        raise UsageError(f"sampler: expected one that diffusers has, got {spec.label}. Choose another, such as Euler.")
    options = {**spec.preset, **_spacing(spec, resolve_schedule(settings.schedule) or spec.schedule)}
    defaults = {n: o.default for n, o in spec.options.items() if o.in_config and o.default is not None}
    return {**asdict(settings), "scheduler": {"class": spec.scheduler, "options": options, "defaults": defaults}}


def _spacing(spec: SamplerSpec, schedule: str | None) -> dict[str, Any]:
    """A spacing in the options of the class; all others of it are off, because it takes one."""
    if schedule is None:
        return {}
    flags = {name: False for name in spec.reads if name.startswith("use_") and name.endswith("_sigmas")}
    if schedule in TIMESTEP_SPACINGS and "timestep_spacing" in spec.reads:
        return {**flags, "timestep_spacing": schedule}
    if f"use_{schedule}_sigmas" in flags:
        return {**flags, f"use_{schedule}_sigmas": True}
    raise UsageError(
        f"schedule: expected one that diffusers has for {spec.label}, got {schedule}. "
        "Choose another schedule or sampler, or leave the peers out."
    )


def checkpoint_of(bundle: Bundle) -> Path | None:
    """The checkpoint that a bundle was exported from, if it is at hand and its networks are still the same.

    It is looked for by its name beside the bundle and in the current folder, or in the cache of the Hugging Face hub.
    None as well where a LoRA or another VAE went into the bundle, so that the checkpoint by itself draws otherwise.
    """
    if bundle.manifest is None:
        return None
    source = {n: found for n, found in bundle.manifest.source.items() if n.split("/")[0] in _NETWORKS}
    if any(n.endswith("/changes") for n in source):
        return None
    if hub := bundle.manifest.source.get("hub"):
        return _cached(hub["repo_id"], hub["commit"], source)
    places, name = (bundle.path.resolve().parent, Path.cwd()), bundle.manifest.name
    candidates = [place / file for place in places for file in (name, f"{name}.safetensors")]
    return next((path for path in candidates if _is_source(path, source)), None)


def _is_source(path: Path, source: Mapping[str, str]) -> bool:
    if path.is_file():
        # All networks are read from the one file.
        return {sha256_of(path)} == {digest for name, digest in source.items() if name.endswith(path.suffix)}
    return path.is_dir() and all((path / n).is_file() and sha256_of(path / n) == digest for n, digest in source.items())


def _cached(repo_id: str, commit: str, source: Mapping[str, str]) -> Path | None:
    """The folder of a commit, whose content is what it was: no hashes are needed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repo_id, name, revision=commit) for name in ("model_index.json", *source)]
    return Path(str(found[0])).parent if all(isinstance(path, str) for path in found) else None
