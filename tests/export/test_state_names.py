"""Names and shapes of weights, held to what diffusers and transformers load from the same files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from families import SD_UNET, SD_VAE, TEXT, make_controlnet, make_taesd, make_text_encoder, make_unet, make_vae
from safetensors.torch import load_file, save_file

from latentrt.export.exporter import export_checkpoint
from latentrt.export.networks import libraries_quiet
from latentrt.export.state_names import fitted
from latentrt.export.weights import Weight, Weights, of_array
from latentrt.runtime import Pipeline
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import load_manifest

OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def stored(tensors: dict[str, torch.Tensor]) -> dict[str, Weight]:
    return {name: of_array(value.numpy()) for name, value in tensors.items()}


def fit(weights: Weights, module: torch.nn.Module) -> dict[str, Weight]:
    return fitted(weights, shapes(module), origin=Path("some/folder"), model_class=type(module).__name__)


def assert_same(found: dict[str, Weight], module: torch.nn.Module) -> None:
    assert list(found) == list(module.state_dict())
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(found[name].read(), value.numpy())
        assert found[name].shape == tuple(value.shape)


def wrapped(tensors: dict[str, torch.Tensor], wrapper: str) -> dict[str, torch.Tensor]:
    """The names that transformers 4 gives the weights of a model that it wraps in another."""
    return {wrapper + name: value for name, value in tensors.items()}


def with_old_attention(tensors: dict[str, torch.Tensor], *, convolutions: bool) -> dict[str, torch.Tensor]:
    """A VAE's weights as the published ones of Stable Diffusion 1 name them, or shaped as in their LDM file."""
    found = {}
    for name, value in tensors.items():
        for new, old in OLD_ATTENTION.items():
            if new in name:
                name = name.replace(new, old)
                value = value[..., None, None] if convolutions and value.ndim == 2 else value
        found[name] = value
    return found


@pytest.fixture(scope="module")
def checker() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config={**vision, "patch_size": 56}, projection_dim=8)
    with libraries_quiet(), torch.random.fork_rng(devices=[]):
        return StableDiffusionSafetyChecker(config).eval()


@pytest.mark.parametrize("projection", [False, True])
def test_text_encoders_of_transformers_4_and_5_load_alike(projection: bool, tmp_path: Path) -> None:
    encoder = make_text_encoder(TEXT, seed=0, projection=projection)
    with libraries_quiet():
        encoder.save_pretrained(tmp_path)
    new = load_file(tmp_path / "model.safetensors")
    assert_same(fit(stored(new), encoder), encoder)
    old = new if projection else wrapped(new, "text_model.")
    old = {**old, "text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert_same(fit(stored(old), encoder), encoder)
    # What transformers itself makes of the old names is the same.
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with libraries_quiet():
        assert_same(fit(stored(new), encoder), type(encoder).from_pretrained(tmp_path))


def test_a_network_of_transformers_4_takes_the_names_of_5() -> None:
    encoder = make_text_encoder(TEXT, seed=0)
    expected = {f"text_model.{name}": shape for name, shape in shapes(encoder).items()}
    found = fitted(stored(encoder.state_dict()), expected, origin=Path(), model_class="CLIPTextModel")
    assert list(found) == list(expected)


def test_a_safety_checker_of_transformers_4_loads(checker: Any, tmp_path: Path) -> None:
    with libraries_quiet():
        checker.save_pretrained(tmp_path)
    new = load_file(tmp_path / "model.safetensors")
    vision = {name: value for name, value in new.items() if name.startswith("vision_model.")}
    old = {**{name: new[name] for name in new.keys() - vision.keys()}, **wrapped(vision, "vision_model.")}
    old["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    for tensors in (new, old):
        assert_same(fit(stored(tensors), checker), checker)


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_attention_of_old_vaes_loads(convolutions: bool, tmp_path: Path) -> None:
    vae = make_vae(SD_VAE, seed=0)
    old = with_old_attention(vae.state_dict(), convolutions=convolutions)
    assert sum(".query." in name or ".proj_attn." in name for name in old) == 8
    assert_same(fit(stored(old), vae), vae)
    if not convolutions:
        with libraries_quiet():
            vae.save_pretrained(tmp_path)
            save_file(old, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
            assert_same(fit(stored(old), vae), diffusers.AutoencoderKL.from_pretrained(tmp_path))


@pytest.mark.parametrize("name", ["unet", "controlnet", "taesd"])
def test_the_other_networks_keep_their_names(name: str) -> None:
    made: dict[str, Any] = {
        "unet": lambda: make_unet(SD_UNET, seed=0),
        "controlnet": lambda: make_controlnet(SD_UNET, seed=0),
        "taesd": lambda: make_taesd(seed=0),
    }
    network = made[name]()
    backwards = dict(reversed(list(network.state_dict().items())))
    assert_same(fit(stored(backwards), network), network)


def test_nothing_is_read_before_it_is_wanted() -> None:
    def read() -> Any:
        raise AssertionError

    weights = {"query.weight": Weight((2, 2, 1, 1), np.dtype(np.float16), read)}
    weights = {f"attention.{name}": weight for name, weight in weights.items()}
    found = fitted(weights, {"attention.to_q.weight": (2, 2)}, origin=Path(), model_class="Network")
    assert found["attention.to_q.weight"].shape == (2, 2)
    assert found["attention.to_q.weight"].dtype == np.float16


def test_all_that_does_not_fit_is_named_at_once() -> None:
    expected = {f"layer.{index}.weight": (4, index + 1) for index in range(15)}
    weights = {name: of_array(np.zeros(shape, np.float32)) for name, shape in list(expected.items())[3:]}
    weights |= {f"extra.{index}": of_array(np.zeros(index + 1, np.float32)) for index in range(12)}
    weights["layer.14.weight"] = of_array(np.zeros((4, 2), np.float32))
    with pytest.raises(ArtifactError) as caught:
        fitted(weights, expected, origin=Path("some/unet"), model_class="UNet2DConditionModel")
    message = str(caught.value)
    assert message.startswith("some/unet: expected exactly the 15 weights of UNet2DConditionModel")
    assert "3 missing: layer.0.weight (4, 1), layer.1.weight (4, 2), layer.2.weight (4, 3);" in message
    assert "12 unexpected: extra.0 (1,), " in message
    assert "extra.9 (10,) and 2 more" in message
    assert "extra.10" not in message
    assert "1 of another shape: layer.14.weight (4, 2) instead of (4, 15)." in message


def test_a_weight_given_under_both_names_is_one_too_many() -> None:
    both = {name: of_array(np.zeros((2, 2), np.float32)) for name in ("a.query.weight", "a.to_q.weight")}
    with pytest.raises(ArtifactError, match=r"1 unexpected: a\.query\.weight \(2, 2\)\."):
        fitted(both, {"a.to_q.weight": (2, 2)}, origin=Path(), model_class="Network")


def test_only_ones_are_left_out_of_a_shape() -> None:
    kernel = {"a.query.weight": of_array(np.zeros((2, 2, 3, 3), np.float32))}
    with pytest.raises(ArtifactError, match=r"a\.to_q\.weight \(2, 2, 3, 3\) instead of \(2, 2\)"):
        fitted(kernel, {"a.to_q.weight": (2, 2)}, origin=Path(), model_class="Network")


def test_checkpoints_of_both_releases_give_one_bundle(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """Weights named as by transformers 4 and old releases of diffusers, and the tokenizer file of transformers 5."""
    other, bundle = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other")), tmp_path / "other.bundle"
    text, vae = other / "text_encoder/model.safetensors", other / "vae/diffusion_pytorch_model.safetensors"
    save_file(wrapped(load_file(text), "text_model."), text, metadata={"format": "pt"})
    save_file(with_old_attention(load_file(vae), convolutions=False), vae, metadata={"format": "pt"})
    with libraries_quiet():
        tokenizer = transformers.CLIPTokenizer.from_pretrained(other / "tokenizer")
        shutil.rmtree(other / "tokenizer")
        tokenizer.save_pretrained(other / "tokenizer")
    assert not (other / "tokenizer/vocab.json").exists()
    export_checkpoint(other, bundle, precisions=["fp32"])
    for artifact in load_manifest(bundle).artifacts:
        assert [(bundle / file).read_bytes() for file in artifact.files] == [
            (tiny_bundle / file).read_bytes() for file in artifact.files
        ]
    first, second = (Pipeline.load(path)("red circle", steps=2, seed=3).images for path in (tiny_bundle, bundle))
    np.testing.assert_array_equal(first, second)
