from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import contents, edited, failing

from latentrt.export import to_onnx as to_onnx_module
from latentrt.export import trace_cache
from latentrt.export.exporter import export_checkpoint
from latentrt.export.graph_builder import components_of
from latentrt.export.to_onnx import graph_key
from latentrt.export.tool_versions import tool_versions
from latentrt.export.trace_cache import cached, default_cache
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.manifest import key_of

INPUTS = {"component": "unet", "tools": {"torch": "2"}}


def test_another_checkpoints_traces_give_the_bytes_of_a_cold_export(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights through the traces of the tiny checkpoint, against an export with an empty cache."""
    assert len(list(default_cache().glob("*.onnx"))) >= 4
    generator = torch.Generator().manual_seed(5)

    def other(weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.1 * torch.randn(weight.shape, generator=generator)

    checkpoint = edited(tiny_checkpoint, tmp_path / "one", "decoder.conv_in.weight", other)
    checkpoint = edited(
        checkpoint, tmp_path / "other", "conv_in.weight", other, file="unet/diffusion_pytorch_model.safetensors"
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", failing(AssertionError("traced")))
        lines = export_checkpoint(checkpoint, tmp_path / "warm.bundle", uint8_vae=True, prompt_keys=True)
    assert {line.status for line in lines} == {"exported"}
    export_checkpoint(checkpoint, tmp_path / "cold.bundle", cache=tmp_path / "cache", uint8_vae=True, prompt_keys=True)
    assert len(list((tmp_path / "cache").glob("*.onnx"))) == 4
    warm, cold = contents(tmp_path / "warm.bundle"), contents(tmp_path / "cold.bundle")
    assert warm.keys() == cold.keys()
    assert [name for name in warm if warm[name] != cold[name]] == []
    shared = {name for name, data in contents(tiny_bundle).items() if warm[name] == data}
    assert not shared & {"unet/model.onnx", "unet/model.fp16.onnx", "vae_decoder/model.onnx"}
    # The traces themselves are the same, so which of the two checkpoints made them does not show.
    for file in (tmp_path / "cache").glob("*.onnx"):
        assert file.read_bytes() == (default_cache() / file.name).read_bytes()


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    assert cached(tmp_path / "new/cache", INPUTS, lambda: b"graph") == b"graph"
    assert cached(tmp_path / "new/cache", INPUTS, failing(AssertionError())) == b"graph"
    assert cached(tmp_path / "new/cache", {**INPUTS, "tools": {"torch": "3"}}, lambda: b"other") == b"other"
    assert cached(None, INPUTS, lambda: b"another") == b"another"
    (record,) = (tmp_path / "new/cache").glob(f"{key_of(INPUTS)}.json")
    assert json.loads(record.read_text()) == {"sha256": hashlib.sha256(b"graph").hexdigest(), "inputs": INPUTS}


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "another hash", "no record", "no graph", "no JSON", "a list", "binary record"]
)
def test_a_damaged_entry_is_made_anew(damage: str, tmp_path: Path) -> None:
    cached(tmp_path, INPUTS, lambda: b"graph")
    (graph,), (record,) = tmp_path.glob("*.onnx"), tmp_path.glob("*.json")
    whole = {path: path.read_bytes() for path in (graph, record)}
    if damage.startswith("no ") and damage != "no JSON":
        (graph if damage == "no graph" else record).unlink()
    elif damage in ("truncated", "garbage"):
        graph.write_bytes(b"grap" if damage == "truncated" else b"grapf")
    else:
        content = {
            "another hash": json.dumps({"sha256": "0" * 64, "inputs": INPUTS}).encode(),
            "no JSON": whole[record][:-4],
            "a list": b"[]",
            "binary record": b"\xff\xfe\x00",
        }
        record.write_bytes(content[damage])
    made: list[bytes] = []

    def make() -> bytes:
        made.append(b"graph")
        return made[-1]

    assert cached(tmp_path, INPUTS, make) == b"graph"
    assert len(made) == 1
    assert {path: path.read_bytes() for path in (graph, record)} == whole


def test_a_damaged_trace_does_not_reach_a_graph(tiny_networks: dict[str, Any], tmp_path: Path) -> None:
    component = components_of(tiny_networks)["text_encoder"]
    key = graph_key(component, 20)
    for suffix in ("onnx", "json"):
        data = (default_cache() / f"{key}.{suffix}").read_bytes()
        (tmp_path / f"{key}.{suffix}").write_bytes(data[:-1] if suffix == "onnx" else data)
    model = to_onnx_module.to_onnx(component, opset=20, cache=tmp_path)
    assert len(list(model.graph)) > 50
    assert (tmp_path / f"{key}.onnx").read_bytes() == (default_cache() / f"{key}.onnx").read_bytes()


@pytest.mark.parametrize("obstacle", ["a file", "no permission", "no space"])
def test_a_cache_that_cannot_be_written_costs_time_only(
    obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    if obstacle == "a file":
        folder.write_text("mine")
    elif obstacle == "no permission":
        # Root may write anywhere, so the system's answer is played.
        monkeypatch.setattr(Path, "mkdir", failing(PermissionError(13, "Permission denied")))
    else:
        monkeypatch.setattr(trace_cache, "write_atomic", failing(OSError(28, "No space left on device")))
    for _ in range(2):
        assert cached(folder, INPUTS, lambda: b"graph") == b"graph"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ([] if obstacle == "no permission" else ["cache"])


# Both are in `make` at the same time, and what they make differs, as traces of two versions in a race would.
FILLING = """
import pathlib, sys, time
from latentrt.export.trace_cache import cached
folder, own, other = pathlib.Path(sys.argv[1]), *sys.argv[2:]
def make():
    (folder / own).touch()
    while not (folder / other).exists():
        time.sleep(0.001)
    return own.encode() * 1000000
for index in range(20):
    cached(folder / "cache", {"index": index}, make)
"""


def test_two_processes_that_fill_the_cache_at_once_leave_whole_entries(tmp_path: Path) -> None:
    both = [
        subprocess.Popen([sys.executable, "-c", FILLING, str(tmp_path), *names]) for names in (("a", "b"), ("b", "a"))
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix not in (".onnx", ".json")]
    for index in range(20):
        assert cached(tmp_path / "cache", {"index": index}, lambda: b"c") in (b"a" * 10**6, b"b" * 10**6, b"c")


def test_the_key_changes_with_everything_that_decides_about_a_graph(
    tiny_networks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    components = components_of(tiny_networks)
    unet = components["unet"]
    key = graph_key(unet, 20)
    assert graph_key(components_of(tiny_networks)["unet"], 20) == key
    spec = dataclasses.replace(unet.spec, inputs=unet.spec.inputs[:-1])
    others = [
        graph_key(unet, 18),
        graph_key(dataclasses.replace(unet, config={**unet.config, "upcast_attention": True}), 20),
        graph_key(dataclasses.replace(unet, spec=spec), 20),
        graph_key(dataclasses.replace(unet, module=components["vae_decoder"].module), 20),
        graph_key(components["vae_encoder"], 20),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(to_onnx_module, "GRAPH_REVISION", 99)
        others.append(graph_key(unet, 20))
    for tool in ("torch", "onnxscript", "diffusers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                to_onnx_module, "tool_versions", lambda names, tool=tool: {**tool_versions(names), tool: "99"}
            )
            others.append(graph_key(unet, 20))
    assert len({key, *others}) == 1 + len(others)


def test_the_weights_have_no_part_in_the_key(tiny_networks: dict[str, Any]) -> None:
    unet = components_of(tiny_networks)["unet"]
    assert graph_key(dataclasses.replace(unet, weights={}), 20) == graph_key(unet, 20)
    # Where a network came from, and the size it draws at by default, say nothing about its graph.
    assert not {"_name_or_path", "sample_size"} & unet.config.keys()


def test_the_folder_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert default_cache() == tmp_path / "graphs"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().name == "graphs"
    if os.name == "posix" and sys.platform != "darwin":
        assert default_cache() == tmp_path / "latentrt/graphs"
