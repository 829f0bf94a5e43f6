"""Engines of the fake TensorRT in a bundle, with real sidecars and manifest entries, and a machine that they fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from engine_bundle import make_bundle, put_graph, text_graph
from fake_cuda import FakeDevice
from onnx import numpy_helper

from latentrt.export.engine_profiles import parse_requests, profiles_of
from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.engine_host import EngineHost
from latentrt.runtime.engine_sidecar import EngineSidecar, PrecisionReadout, read_sidecar, sidecar_json
from latentrt.runtime.machine import Gpu, Machine, Package
from latentrt.runtime.manifest import (
    EngineRecord,
    key_of,
    load_manifest,
    record_of,
    save_manifest,
    update_manifest,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes"
DRAWING = ("text_encoder", "unet", "vae_decoder")
VERSION = "1.7.1.116"
GPU = Gpu("Fake GPU", "sm89", 1 << 30)
MACHINE = Machine(
    gpus=(GPU,),
    cuda=(13, 0),
    packages={"tensorrt_rtx": Package(VERSION, 13), "tensorrt": Package(VERSION, 13)},
    platform="linux_x86_64",
)


def drawing_bundle(path: Path) -> Path:
    """The graphs of `engine_bundle` in fp16 with the tokenizer and the noise schedule of the example, and engines."""
    make_bundle(path)
    text = text_graph()
    words = np.random.default_rng(0).standard_normal((49408, 16)).astype(np.float16)
    text.graph.initializer[0].CopyFrom(numpy_helper.from_array(words, "embedding"))
    manifest = put_graph(path, "text_encoder", "fp16", text, load_manifest(path))
    (path / "text_encoder" / "config.json").write_text('{"hidden_size": 64}')
    (path / "unet" / "config.json").write_text('{"sample_size": 8, "in_channels": 4, "cross_attention_dim": 64}')
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(EXAMPLE / name, path / name)
    configs = [*path.glob("*/*.json"), *path.glob("tokenizer/*.txt")]
    files = {str(file.relative_to(path)): record_of(file) for file in configs}
    save_manifest(path, dataclasses.replace(manifest, files={**manifest.files, **files}))
    for index, component in enumerate(DRAWING):
        put_engine(path, component, "fp16", weight_bytes=1000 * 10**index)
    return path


def put_engine(
    bundle: Path,
    component: str,
    precision: str,
    *,
    size: str = "64",
    batch: str = "1",
    text_chunks: str = "1",
    factor: int = 8,
    flavour: str = "tensorrt_rtx",
    activation_bytes: int = 4096,
    weight_bytes: int = 1000,
    **fields: Any,
) -> EngineSidecar:
    """Add an engine as `latentrt build` would; `fields` are of its sidecar."""
    opened = open_bundle(bundle)
    assert opened.manifest is not None
    spec = open_session(opened, component, precision, backend="onnxruntime").spec
    requests = parse_requests(size=size, batch=batch, text_chunks=text_chunks, factor=factor)
    profiles = profiles_of(component, spec.inputs, requests, factor=factor)
    stated = {
        "bundle": str(bundle),
        "component": component,
        "precision": precision,
        "profiles": [{name: dataclasses.asdict(shapes) for name, shapes in profile.items()} for profile in profiles],
        "activation_bytes": activation_bytes,
        "weight_bytes": weight_bytes,
        "stripped": fields.get("stripped", False),
    }
    content = json.dumps(stated).encode()
    key = key_of({**stated, "flavour": flavour, "fields": str(fields)})
    path = bundle / component / "engines" / f"{key[:16]}.engine"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    artifact = opened.manifest.artifact(component, precision)
    assert artifact is not None
    sidecar = EngineSidecar(
        component=component,
        precision=precision,
        key=key,
        flavour=flavour,
        flavour_version=VERSION,
        cuda_major=13,
        targets=("sm89",),
        gpu_name=GPU.name if flavour == "tensorrt" else None,
        platform="linux_x86_64",
        onnx={name: opened.manifest.files[name].sha256 for name in artifact.files},
        flags=(),
        profiles=profiles,
        inputs=spec.inputs,
        outputs=spec.outputs,
        precisions=PrecisionReadout({}, {}, "none"),
        build_seconds=1.0,
        engine_bytes=len(content),
        engine_sha256=record_of(path).sha256,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        tensor_bytes=None,
        obtained={},
        made_from={},
        pixels_per_latent=factor,
    )
    write_sidecar(bundle, path, dataclasses.replace(sidecar, **fields))
    names = (str(path.relative_to(bundle)), str(path.with_suffix(".json").relative_to(bundle)))
    record = EngineRecord(component, precision, *names, key, flavour, fields.get("targets", ("sm89",)))
    update_manifest(bundle, lambda manifest: dataclasses.replace(manifest, engines=(*manifest.engines, record)))
    return dataclasses.replace(sidecar, **fields)


def write_sidecar(bundle: Path, engine: Path, sidecar: EngineSidecar) -> None:
    """Write a sidecar, and enter engine and sidecar in the manifest."""
    path = engine.with_suffix(".json")
    path.write_bytes(sidecar_json(sidecar))
    files = {str(file.relative_to(bundle)): record_of(file) for file in (engine, path)}
    update_manifest(bundle, lambda manifest: dataclasses.replace(manifest, files={**manifest.files, **files}))


def edit_sidecar(bundle: Path, component: str, **fields: Any) -> None:
    """Change an engine's sidecar, as if it had been built so."""
    (path,) = (bundle / component / "engines").glob("*.json")
    write_sidecar(bundle, path.with_suffix(".engine"), dataclasses.replace(read_sidecar(path), **fields))


def fake_host(device: FakeDevice, **settings: Any) -> EngineHost:
    """What opens engines on the fake GPU; `import_flavour` is the caller's to replace."""
    return EngineHost(**{"open_device": lambda: device, "look": lambda: MACHINE, **settings})
