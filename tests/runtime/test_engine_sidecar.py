from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentrt.runtime.engine_sidecar import (
    BuildAttempt,
    EngineSidecar,
    PrecisionReadout,
    ShapeProfile,
    covers,
    describe_profiles,
    read_sidecar,
    sidecar_json,
    why_unusable,
)
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.machine import Gpu, Machine, Package
from latentrt.runtime.specs import TensorSpec

SIDECAR = EngineSidecar(
    component="unet",
    precision="fp16",
    key="ab" * 32,
    flavour="tensorrt_rtx",
    flavour_version="1.7.1.116",
    cuda_major=13,
    targets=("sm86", "sm89"),
    gpu_name=None,
    platform="linux_x86_64",
    onnx={"unet/model.fp16.onnx": "cd" * 32},
    flags=("TF32",),
    profiles=({"sample": ShapeProfile((1, 4, 8, 8), (2, 4, 16, 16), (16, 4, 32, 32))},),
    inputs=(TensorSpec("sample", "float32", ("b", 4, "h", "w")),),
    outputs=(TensorSpec("out_sample", "float32", ("b", 4, "h", "w")),),
    precisions=PrecisionReadout(layers={"Half": 9, "Float": 1}, weights={"Half": 75, "Float": 25}, method="types"),
    build_seconds=12.5,
    engine_bytes=1000,
    engine_sha256="ef" * 32,
    weight_bytes=800,
    activation_bytes=None,
    tensor_bytes=64,
    obtained={"weight_bytes": "log"},
    made_from={"targets": ["sm86", "sm89"]},
)
ADA = Gpu("RTX 4090", "sm89", 24 << 30)
FITTING = Machine(
    gpus=(ADA,), cuda=(13, 0), packages={"tensorrt_rtx": Package("1.7.1.116", 13)}, platform="linux_x86_64"
)


DEFAULTED = (
    *(
        "inspected_layers",
        "flops",
        "refit",
        "refittable",
        "stripped",
        "thin",
        "compatibility",
        "attempts",
        "layer_report",
    ),
    "pixels_per_latent",
)


def test_a_sidecar_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(sidecar_json(SIDECAR))
    assert read_sidecar(path) == SIDECAR


def test_every_field_reads_back(tmp_path: Path) -> None:
    full = dataclasses.replace(
        SIDECAR,
        profiles=(*SIDECAR.profiles, {"sample": ShapeProfile(*[(2, 4, 64, 64)] * 3)}),
        inspected_layers={"Half": 3},
        flops={"Half": 0.75, "Float": 0.25},
        refit="individual",
        refittable=("to_k.weight",),
        stripped=True,
        thin=True,
        compatibility=("ampere_plus",),
        attempts=(BuildAttempt({"workspace_mib": 1}, "no memory", 2.5),),
        layer_report="ab.layers.json",
        pixels_per_latent=16,
    )
    path = tmp_path / "x.json"
    path.write_bytes(sidecar_json(full))
    assert read_sidecar(path) == full


def test_a_sidecar_of_version_1_has_one_profile(tmp_path: Path) -> None:
    content: dict[str, Any] = json.loads(sidecar_json(SIDECAR))
    content = {name: value for name, value in content.items() if name not in DEFAULTED or name == "inspected_layers"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**content, "sidecar_version": 1, "profiles": content["profiles"][0]}))
    assert read_sidecar(path) == SIDECAR


def unet_profile(rows: tuple[int, int], side: tuple[int, int], tokens: tuple[int, int] = (77, 77)) -> dict[str, Any]:
    low, high = ((r, 4, s, s) for r, s in zip(rows, side, strict=True))
    text = [(r, n, 64) for r, n in zip(rows, tokens, strict=True)]
    return {"sample": ShapeProfile(low, low, high), "encoder_hidden_states": ShapeProfile(text[0], text[0], text[1])}


BUCKETS = dataclasses.replace(
    SIDECAR,
    profiles=(
        unet_profile((1, 8), (32, 128), (77, 231)),
        unet_profile((2, 2), (64, 64)),
        unet_profile((2, 4), (64, 64)),
        unet_profile((4, 4), (64, 64)),
    ),
)


@pytest.mark.parametrize(
    ("rows", "side", "tokens", "index"),
    [
        (2, 64, 77, 1),
        (3, 64, 77, 2),
        (4, 64, 77, 3),
        (2, 64, 154, 0),
        (1, 96, 77, 0),
        (9, 64, 77, None),
        (2, 65, 77, 0),
    ],
)
def test_the_tightest_profile_that_holds_the_shapes_is_taken(
    rows: int, side: int, tokens: int, index: int | None
) -> None:
    shapes = {"sample": (rows, 4, side, side), "encoder_hidden_states": (rows, tokens, 64)}
    assert covers(BUCKETS, shapes) == index


def test_shapes_of_other_inputs_or_ranks_are_held_by_none() -> None:
    shapes = {"sample": (2, 4, 64, 64), "encoder_hidden_states": (2, 77, 64)}
    assert covers(BUCKETS, {**shapes, "more": (1,)}) is None
    assert covers(BUCKETS, {"sample": (2, 4, 64, 64)}) is None
    assert covers(BUCKETS, {**shapes, "sample": (2, 4, 64)}) is None
    assert covers(BUCKETS, {**shapes, "sample": (2, 5, 64, 64)}) is None


def test_profiles_are_described_in_pixels_and_rows() -> None:
    assert describe_profiles(BUCKETS) == (
        "256..1024x256..1024 pixels, 1..8 rows of 77..231 tokens; 512x512 pixels, 2 rows of 77 tokens; "
        "512x512 pixels, 2..4 rows of 77 tokens; 512x512 pixels, 4 rows of 77 tokens "
        "(an image takes one row, with guidance two)"
    )
    encoder = {"sample": ShapeProfile(*[(1, 3, 512, 768)] * 3)}
    picture = dataclasses.replace(SIDECAR, component="vae_encoder", profiles=(encoder, encoder))
    assert describe_profiles(picture) == "512x768 pixels, 1 row"
    text = dataclasses.replace(
        SIDECAR, component="text_encoder", profiles=({"input_ids": ShapeProfile(*[(1, 77)] * 3)},)
    )
    assert describe_profiles(text) == "1 row of 77 tokens"


def test_shares_are_of_weights_and_nan_without_any() -> None:
    assert SIDECAR.precisions.share("Half") == 0.75
    assert SIDECAR.precisions.share("Int8") == 0.0
    assert math.isnan(PrecisionReadout({}, {}, "").share("Half"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected an engine's sidecar"),
        (b"{", "expected an engine's sidecar"),
        (b"[]", "got another file"),
        (b'{"kind": "latentrt engine sidecar", "sidecar_version": 99}', "version 2 or older, got 99"),
        (b'{"kind": "latentrt engine sidecar"}', "version 2 or older, got None"),
        (b'{"kind": "latentrt engine sidecar", "sidecar_version": 2}', "complete sidecar"),
    ],
)
def test_damaged_sidecars_are_artifact_errors(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=said):
        read_sidecar(path)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineSidecar) if field.name != "kind"])
def test_a_sidecar_that_lacks_a_field_is_refused_unless_it_has_a_default(tmp_path: Path, name: str) -> None:
    content: dict[str, Any] = json.loads(sidecar_json(SIDECAR))
    del content[name]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    if name in DEFAULTED:
        assert read_sidecar(path) == SIDECAR
    else:
        with pytest.raises(ArtifactError):
            read_sidecar(path)


def test_nothing_speaks_against_an_engine_on_its_machine() -> None:
    assert why_unusable(SIDECAR, FITTING) is None
    assert why_unusable(SIDECAR, dataclasses.replace(FITTING, cuda=None)) is None
    assert why_unusable(SIDECAR, dataclasses.replace(FITTING, platform="windows_amd64")) is None


@pytest.mark.parametrize(
    ("changes", "said", "remedy"),
    [
        ({"packages": {}}, "tensorrt_rtx, which is not installed", "pip install 'latentrt[tensorrt-rtx]'"),
        ({"gpus": (), "why_no_gpu": "no NVIDIA driver"}, "no NVIDIA driver", "ONNX Runtime"),
        ({"gpus": (Gpu("RTX 5090", "sm120", 1),)}, "this GPU (RTX 5090) is sm120", "--precision fp16 --target sm120"),
        ({"gpus": (Gpu("H200", "sm90", 1),)}, "this GPU (H200) is sm90", "--target sm90"),
        ({"gpus": (Gpu("H200", "sm90", 1),)}, "sm90", "pip install 'latentrt[tensorrt]' and then"),
        ({"packages": {"tensorrt_rtx": Package("1.8.0.1", 13)}}, "and 1.8.0.1 is installed", "--target sm89"),
        ({"cuda": (12, 8)}, "needs a driver for CUDA 13, and this one supports 12.8", "Update the NVIDIA driver"),
    ],
)
def test_why_it_cannot_be_used_and_what_to_run(changes: dict[str, Any], said: str, remedy: str) -> None:
    reason = why_unusable(SIDECAR, dataclasses.replace(FITTING, **changes))
    assert reason is not None
    assert said in reason
    assert remedy in reason


def test_which_gpu_is_asked_about_decides() -> None:
    two = dataclasses.replace(FITTING, gpus=(Gpu("RTX 5090", "sm120", 1), ADA))
    assert why_unusable(SIDECAR, two, device=1) is None
    assert "sm120" in (why_unusable(SIDECAR, two) or "")
    assert "GPU 2 was asked for" in (why_unusable(SIDECAR, two, device=2) or "")
    assert "GPU -1 was asked for" in (why_unusable(SIDECAR, two, device=-1) or "")


@pytest.mark.parametrize(("sm", "runs"), [("sm75", False), ("sm80", True), ("sm90", True), ("sm120", True)])
def test_an_engine_for_ampere_and_later_runs_there(sm: str, runs: bool) -> None:
    wide = dataclasses.replace(SIDECAR, compatibility=("ampere_plus",))
    machine = dataclasses.replace(FITTING, gpus=(Gpu("another", sm, 1),))
    assert (why_unusable(wide, machine) is None) == runs


@pytest.mark.parametrize(
    ("version", "reads"), [("11.4.0.1", True), ("11.10.0.1", True), ("11.3.9.9", False), ("12.0.0.1", False)]
)
def test_a_version_compatible_engine_is_read_by_later_versions_of_its_major(version: str, reads: bool) -> None:
    packages = {"tensorrt": Package(version, 13)}
    sidecar = dataclasses.replace(SIDECAR, flavour="tensorrt", flavour_version="11.4.0.1")
    compatible = dataclasses.replace(sidecar, compatibility=("version_compatible",))
    machine = dataclasses.replace(FITTING, packages=packages)
    assert (why_unusable(compatible, machine) is None) == reads
    assert (why_unusable(sidecar, machine) is None) == (version == "11.4.0.1")


def test_an_engine_of_full_tensorrt_stays_on_its_platform() -> None:
    sidecar = dataclasses.replace(SIDECAR, flavour="tensorrt", flavour_version="11.0.0.1")
    machine = dataclasses.replace(FITTING, packages={"tensorrt": Package("11.0.0.1", 13)})
    assert why_unusable(sidecar, machine) is None
    moved = dataclasses.replace(machine, platform="windows_amd64")
    assert "built on linux_x86_64, and this is windows_amd64" in (why_unusable(sidecar, moved) or "")


def test_reading_one_loads_no_backend() -> None:
    program = (
        "import sys, latentrt.runtime.engine_sidecar;"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
