from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from latentrt.runtime.backends import choose_graph, default_precision, open_session
from latentrt.runtime.bundle import DRAWING, Bundle
from latentrt.runtime.components import PICTURES, Components
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.manifest import Artifact, EngineRecord, Manifest


def bundle_of(**held: str) -> Bundle:
    """A bundle whose manifest says that it holds components in precisions, divided by blanks."""
    artifacts = [
        Artifact(component, precision, f"{component}/model.{precision}.onnx", (), 20, "", {}, {}, 0)
        for component, precisions in held.items()
        for precision in precisions.split()
    ]
    manifest = Manifest(
        name="made",
        latentrt_version="0",
        pipeline_class="StableDiffusionPipeline",
        source={},
        files={},
        artifacts=tuple(artifacts),
    )
    return Bundle(path=Path("made.bundle"), manifest=manifest)


def test_a_run_in_fp16_takes_the_mixed_graph_of_what_would_overflow() -> None:
    bundle = bundle_of(text_encoder="fp16 fp32", unet="fp32 fp16", vae_decoder="mixed fp32")
    assert bundle.precisions() == ["fp32", "fp16"]
    assert bundle.precision_of("vae_decoder", "fp16") == "mixed"
    assert bundle.precision_of("unet", "fp16") == "fp16"
    assert bundle.precision_of("vae_decoder", "bf16") is None


def test_fp16_comes_before_mixed_and_nothing_stands_in_for_the_others() -> None:
    bundle = bundle_of(text_encoder="bf16 mixed fp16", unet="bf16 mixed fp16", vae_decoder="fp16 mixed bf16")
    assert bundle.precisions() == ["fp16", "mixed", "bf16"]
    assert bundle.precision_of("unet", "fp16") == "fp16"
    other = bundle_of(text_encoder="fp16", unet="fp16", vae_decoder="fp16")
    assert [other.precision_of("unet", precision) for precision in ("mixed", "fp32", "bf16")] == [None] * 3


@pytest.mark.parametrize(
    ("pictures", "precision", "decoder"),
    [
        ("fp32", "fp32", PICTURES),
        ("fp32", "fp16", "vae_decoder"),
        ("mixed", "fp16", PICTURES),
        ("fp16", "fp16", "vae_decoder"),
    ],
)
def test_the_decoder_of_pictures_is_taken_in_the_precision_of_the_other(
    pictures: str, precision: str, decoder: str
) -> None:
    bundle = bundle_of(text_encoder="fp16 fp32", unet="fp32 fp16", vae_decoder="mixed fp32", vae_decoder_uint8=pictures)
    assert Components(bundle, precision).picture_decoder == decoder


def test_a_bundle_without_it_decodes_as_ever() -> None:
    bundle = bundle_of(text_encoder="fp32", unet="fp32", vae_decoder="fp32")
    assert Components(bundle, None).picture_decoder == "vae_decoder"


def test_bfloat16_is_refused_on_the_cpu_with_the_remedy() -> None:
    bundle = bundle_of(text_encoder="bf16", unet="bf16", vae_decoder="bf16")
    with pytest.raises(BackendError, match=r"unet: .*bf16.*--precision fp32.*latentrt build made\.bundle"):
        open_session(bundle, "unet", "bf16", backend="onnxruntime")


def test_what_is_not_held_says_what_is() -> None:
    bundle = bundle_of(text_encoder="fp32", unet="fp32", vae_decoder="fp32")
    with pytest.raises(UsageError, match=r"expected unet in fp16, found \['fp32'\]"):
        Components(bundle, "fp16", verify=False)["unet"]


def test_a_quantized_unet_draws_with_the_others_in_half_precision() -> None:
    bundle = bundle_of(text_encoder="fp32 fp16", unet="fp32 int8 fp16", vae_decoder="fp32 mixed", vae_encoder="fp32")
    parts = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    assert [bundle.precision_of(part, "int8") for part in parts] == ["fp16", "int8", "mixed", "fp32"]
    # Nobody gets it who has not asked for it.
    assert bundle.precisions() == ["fp32", "fp16", "int8"]
    assert default_precision(bundle, backend="auto") == "fp32"
    assert default_precision(bundle, backend="tensorrt") == "fp16"
    both = bundle_of(text_encoder="fp16", unet="fp16 int8", vae_decoder="fp16 int8")
    assert both.precision_of("vae_decoder", "int8") == "int8"


def test_a_decoder_alone_makes_no_quantized_run() -> None:
    bundle = bundle_of(text_encoder="fp16", unet="fp16", vae_decoder="fp16 int8")
    assert bundle.precisions() == ["fp16"]
    with pytest.raises(UsageError, match=r"unet in int8, found \['fp16'\]\. Run: latentrt calibrate made\.bundle"):
        Components(bundle, "int8", verify=False)["unet"]
    # Beside a quantized U-Net, a text encoder is for the export to make.
    weights = bundle_of(text_encoder="fp16", unet="fp16 int8w", vae_decoder="int8 fp16")
    assert [weights.precision_of(part, "int8w") for part in DRAWING] == ["fp16", None, "int8w", "fp16"]
    assert weights.precisions() == ["fp16", "int8w"]
    bare = bundle_of(text_encoder="bf16", unet="fp16 int8", vae_decoder="fp16")
    with pytest.raises(UsageError, match=r"text_encoder in int8, found \['bf16'\]\. Run: latentrt export .* fp16"):
        Components(bare, "int8", verify=False)["text_encoder"]


def test_engines_in_int8_are_what_is_drawn_with_where_they_alone_were_built() -> None:
    bundle = bundle_of(text_encoder="fp16", unet="fp16 int8", vae_decoder="fp16")
    assert bundle.manifest is not None
    engine = EngineRecord("unet", "int8", "unet/e.engine", "unet/e.json", "k", "tensorrt", ("sm89",))
    held = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, engines=(engine,)))
    assert default_precision(held, backend="tensorrt") == "int8"
    assert default_precision(held, backend="onnxruntime") == "fp16"
    other = dataclasses.replace(engine, precision="fp16")
    two = dataclasses.replace(bundle.manifest, engines=(engine, other))
    assert default_precision(dataclasses.replace(bundle, manifest=two), backend="tensorrt") == "fp16"


def test_onnx_runtime_takes_the_graph_that_was_quantized_for_it() -> None:
    bundle = bundle_of(text_encoder="fp16", unet="fp16 int8", vae_decoder="fp16")
    assert bundle.manifest is not None
    plain = choose_graph(bundle, "unet", "int8", backend="onnxruntime")
    # `latentrt optimize` has nothing for it.
    assert (plain.target, "latentrt" in plain.reason) == ("", False)
    own = Artifact("unet", "int8", "unet/model.int8.cpu.onnx", (), 20, "", {}, {}, 0, target="cpu")
    manifest = dataclasses.replace(bundle.manifest, artifacts=(*bundle.manifest.artifacts, own))
    held = dataclasses.replace(bundle, manifest=manifest)
    assert choose_graph(held, "unet", "int8", backend="onnxruntime").target == "cpu"
    assert choose_graph(held, "unet", "int8", backend="cuda").target == ""
    assert "latentrt optimize made.bundle --target cpu --precision int8" in (
        choose_graph(held, "unet", "int8", backend="onnxruntime").reason
    )
    fast = dataclasses.replace(own, path="unet/model.int8.cpu-kernels.onnx", target="cpu-kernels")
    both = dataclasses.replace(bundle, manifest=dataclasses.replace(manifest, artifacts=(*manifest.artifacts, fast)))
    choice = choose_graph(both, "unet", "int8", backend="onnxruntime")
    assert (choice.target, "latentrt" in choice.reason) == ("cpu-kernels", False)
    assert choose_graph(both, "unet", "int8", backend="cuda").target == ""
