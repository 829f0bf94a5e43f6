from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.components import PICTURES, Components
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.manifest import Artifact, Manifest


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
