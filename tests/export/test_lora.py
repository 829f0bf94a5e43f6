"""LoRAs folded in at export: against diffusers' load_lora_weights and fuse_lora, in every format of a trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import torch
from lora_files import EVERYTHING, PROJECTIONS, distance, kohya, parts_of, peft, random_lora, reference, scaled, write

from latentrt.export.checkpoint_parts import Part
from latentrt.export.ldm_names import unet_names
from latentrt.export.lora import fused
from latentrt.export.lora_file import read_lora
from latentrt.export.networks import libraries_quiet
from latentrt.export.unet_structure import diffusers_structure
from latentrt.export.weights import Weight

FAMILIES = tuple(lora_files.CLASSES)

Pipelines = Callable[[str], Any]


@pytest.fixture(scope="module")
def pipeline(family_sources: Callable[[str], Any]) -> Pipelines:
    """A fresh diffusers pipeline of a family, in float32."""

    return lambda family: lora_files.load_pipeline(family, family_sources(family).path)


def folded(parts: Mapping[str, Part], files: Sequence[tuple[Path, float]]) -> Mapping[str, Part]:
    for path, scale in files:
        parts = fused(parts, read_lora(path), scale=scale)
    return parts


def check(
    pipeline: Any,
    files: Sequence[tuple[Path, float]],
    targets: Mapping[str, Any],
    *,
    same: Sequence[tuple[Path, float]] | None = None,
) -> None:
    """Hold every weight to diffusers', the changed ones to a change that shows.

    Args:
        same: files of the same changes to give to diffusers, where it does not read these right.
    """
    parts = parts_of(pipeline)
    wanted = reference(pipeline, same or files)
    result, worst = folded(parts, files), 0.0
    for name, part in result.items():
        changed = {f"{module}.weight" for module in targets.get(name, ())}
        for key, weight in part.weights.items():
            before, after = parts[name].weights[key].read(), weight.read()
            if key in changed:
                assert after.dtype == np.float32
                worst = max(worst, distance(after, wanted[name][key]))
                assert distance(before, wanted[name][key]) > 0.03, key
            else:
                assert after is before
                np.testing.assert_array_equal(before, wanted[name][key])
    assert worst <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "diffusers_new", "peft"])
def test_every_format_equals_diffusers(tmp_path: Path, pipeline: Pipelines, family: str, layout: str) -> None:
    """Attention and feed-forward layers of the U-Net and the text encoders, without alpha."""
    loaded = pipeline(family)
    lora = random_lora(loaded, seed=1)
    path = write(tmp_path / "lora.safetensors", getattr(lora_files, layout)(lora))
    check(loaded, [(path, 0.8)], lora)


@pytest.mark.parametrize("family", ["sd15", "sdxl_base"])
def test_the_first_keys_of_diffusers(tmp_path: Path, pipeline: Pipelines, family: str) -> None:
    loaded = pipeline(family)
    lora = random_lora(loaded, seed=1, modules=r"attn[12]\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$")
    path = write(tmp_path / "lora.safetensors", lora_files.diffusers_old(lora))
    check(loaded, [(path, 0.8)], lora)


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha(tmp_path: Path, pipeline: Pipelines, family: str) -> None:
    loaded = pipeline(family)
    lora = random_lora(loaded, seed=2, rank=4, alpha=2)
    path = write(tmp_path / "lora.safetensors", kohya(lora))
    check(loaded, [(path, 0.7)], lora)


def test_alpha_in_the_metadata_of_peft(tmp_path: Path, pipeline: Pipelines) -> None:
    loaded = pipeline("sd15")
    lora = random_lora(loaded, seed=3, rank=4, alpha=8)
    settings = {
        f"{component}.{option}": value
        for component, modules in lora.items()
        for option, value in {
            "r": 4,
            "lora_alpha": 8,
            "alpha_pattern": {next(iter(modules)): 2},
            "target_modules": list(modules),
        }.items()
    }
    path = write(tmp_path / "lora.safetensors", peft(lora), lora_adapter_metadata=settings)
    check(loaded, [(path, 1.0)], lora)


def test_alphas_of_modules(tmp_path: Path, pipeline: Pipelines) -> None:
    """diffusers takes the most frequent alpha for all: it gets the factors with the alphas multiplied out."""
    loaded = pipeline("sd15")
    lora = {
        component: {
            name: replace(factors, alpha=1 + index % 3) for index, (name, factors) in enumerate(modules.items())
        }
        for component, modules in random_lora(loaded, seed=4, rank=4, alpha=2).items()
    }
    path = write(tmp_path / "lora.safetensors", kohya(lora))
    same = write(tmp_path / "same.safetensors", peft(scaled(lora)))
    check(loaded, [(path, 1.0)], lora, same=[(same, 1.0)])


@pytest.mark.parametrize("family", ["sd15", "sdxl_base"])
def test_several_in_turn(tmp_path: Path, pipeline: Pipelines, family: str) -> None:
    loaded = pipeline(family)
    first = random_lora(loaded, seed=5, rank=2, alpha=1)
    second = random_lora(loaded, seed=6, components=["unet"], modules=r"attn2\.to_[kv]$|ff\.net\.2$")
    files = [
        (write(tmp_path / "first.safetensors", kohya(first)), 0.6),
        (write(tmp_path / "second.safetensors", peft(second)), -0.4),
    ]
    parts = parts_of(loaded)
    check(loaded, files, first)
    assert [[change["file"] for change in part.changes] for part in folded(parts, files).values()] == [
        ["first.safetensors", "second.safetensors"],
        *[["first.safetensors"]] * (len(parts) - 1),
    ]


@pytest.mark.parametrize("family", ["sd15", "sdxl_base"])
def test_convolutions(tmp_path: Path, pipeline: Pipelines, family: str) -> None:
    """Every layer of the networks: LoCon's 3 x 3 and 1 x 1 convolutions, embeddings and projections."""
    loaded = pipeline(family)
    lora = random_lora(loaded, seed=7, modules=EVERYTHING)
    path = write(tmp_path / "lora.safetensors", peft(lora))
    check(loaded, [(path, 0.9)], lora)
    # diffusers leaves out what it does not know of kohya's names.
    path = write(tmp_path / "kohya.safetensors", kohya(lora))
    check(loaded, [(path, 0.9)], lora, same=[(tmp_path / "lora.safetensors", 0.9)])


def test_the_original_names_of_sdxl(tmp_path: Path, pipeline: Pipelines) -> None:
    """sd-scripts trains SDXL's U-Net under the names of the original repository."""
    loaded = pipeline("sdxl_base")
    lora = random_lora(loaded, seed=8, modules=EVERYTHING, rank=4, alpha=2)
    weights = parts_of(loaded)["unet"].weights
    names = {
        name.removesuffix(".weight"): original.removesuffix(".weight")
        for name, original in unet_names(diffusers_structure(weights, Path())).items()
    }
    path = write(tmp_path / "lora.safetensors", kohya(lora, names))
    check(loaded, [(path, 0.9)], lora)


@pytest.mark.parametrize("family", ["sd15", "sdxl_base"])
def test_dora(tmp_path: Path, pipeline: Pipelines, family: str) -> None:
    """Linear layers and convolutions; the same numbers as kohya's `dora_scale`, which diffusers leaves out."""
    loaded = pipeline(family)
    attention = random_lora(loaded, seed=9, dora=True)
    convolutions = random_lora(loaded, seed=10, dora=True, components=["unet"], modules=r"resnets\.\d\.conv[12]$")
    lora = {**attention, "unet": {**attention["unet"], **convolutions["unet"]}}
    path = write(tmp_path / "lora.safetensors", peft(lora))
    parts = parts_of(loaded)
    check(loaded, [(path, 0.8)], lora)
    other = folded(parts, [(write(tmp_path / "kohya.safetensors", kohya(lora)), 0.8)])
    for name, part in folded(parts, [(path, 0.8)]).items():
        for key, weight in part.weights.items():
            np.testing.assert_array_equal(other[name].weights[key].read(), weight.read())


def test_dora_of_inputs(tmp_path: Path, pipeline: Pipelines) -> None:
    """LyCORIS' first DoRAs hold one number for each input: each column of the result has that norm."""
    loaded = pipeline("sd15")
    lora = random_lora(loaded, seed=9, components=["unet"], modules=r"attn1\.to_q$|conv2$")
    tensors, magnitudes = kohya(lora), {}
    for name in lora["unet"]:
        inputs = loaded.unet.get_submodule(name).weight.shape[1]
        shape = (1, inputs, *(1,) * (loaded.unet.get_submodule(name).weight.ndim - 2))
        magnitudes[name] = torch.linspace(1, 2, inputs)
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = magnitudes[name].reshape(shape)
    weights = folded(parts_of(loaded), [(write(tmp_path / "lora.safetensors", tensors), 1.0)])["unet"].weights
    for name, magnitude in magnitudes.items():
        columns = np.moveaxis(weights[f"{name}.weight"].read(), 1, 0).reshape(len(magnitude), -1)
        np.testing.assert_allclose(np.linalg.norm(columns, axis=1), magnitude, rtol=1e-6)


@pytest.mark.parametrize("method", ["LoHa", "LoKr"])
@pytest.mark.parametrize("tucker", [False, True], ids=["matrices", "tucker"])
def test_lycoris(tmp_path: Path, pipeline: Pipelines, method: str, tucker: bool) -> None:
    """LoHa and LoKr against peft's own layers, whose factors are written under LyCORIS' names."""
    loaded = pipeline("sd15")
    tensors, changes = lycoris(loaded.unet, method, tucker=tucker)
    path = write(tmp_path / "lora.safetensors", tensors)
    assert any(key.endswith("_t2") for key in tensors) == tucker
    result = folded(parts_of(pipeline("sd15")), [(path, 0.5)])["unet"].weights
    before = pipeline("sd15").unet.state_dict()
    for name, change in changes.items():
        weight = before[f"{name}.weight"]
        assert change.norm() > 0.1 * weight.norm()
        assert distance(result[f"{name}.weight"].read(), (weight + 0.5 * change).numpy()) <= 1e-6


def lycoris(unet: Any, method: str, *, tucker: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A random LoHa or LoKr from peft: a LyCORIS file's tensors, and the changes by module."""
    with libraries_quiet():
        import peft as library

        config = getattr(library, f"{method}Config")(
            r=2,
            alpha=1,
            use_effective_conv2d=tucker,
            target_modules=r".*(attn2\.to_k|ff\.net\.2|resnets\.\d\.conv1|conv_shortcut)",
        )
        library.inject_adapter_in_model(config, unet)
    generator = torch.Generator().manual_seed(11)
    tensors, changes = {}, {}
    for name, module in unet.named_modules():
        if "default" not in getattr(module, "r", {}):
            continue
        factors = {
            key.removesuffix(".default"): value
            for key, value in module.named_parameters()
            if "_w" in key or "_t" in key
        }
        for role, value in factors.items():
            value.data = 0.6 * torch.randn(value.shape, generator=generator)
            tensors[f"lora_unet_{name.replace('.', '_')}.{role}"] = value.data
        tensors[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(1.0)
        changes[name] = module.get_delta_weight("default").detach()
        if {"lokr_w1", "lokr_w2"} <= factors.keys():  # of no rank: LyCORIS knows no alpha then
            changes[name] *= 2
    return tensors, changes


def test_tuckers_core_of_a_locon(tmp_path: Path, pipeline: Pipelines) -> None:
    loaded = pipeline("sd15")
    lora = random_lora(loaded, seed=12, components=["unet"], modules=r"resnets\.\d\.conv1$", rank=3)
    generator = torch.Generator().manual_seed(13)
    tensors: dict[str, torch.Tensor] = {}
    changes = {}
    for name, factors in lora["unet"].items():
        down, up = factors.down[:, :, :1, :1], factors.up
        mid = torch.randn(3, 3, 3, 3, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.lora_mid.weight": mid}
        # As the layers run: 1 x 1, 3 x 3, 1 x 1, on one pixel for each weight.
        identity = torch.eye(down.shape[1] * 9).reshape(-1, down.shape[1], 3, 3)
        conv = torch.nn.functional.conv2d
        changes[name] = conv(conv(conv(identity, down), mid), up).reshape(identity.shape[0], -1).T
    parts = parts_of(loaded)
    result = folded(parts, [(write(tmp_path / "lora.safetensors", tensors), 1.0)])["unet"].weights
    for name, change in changes.items():
        before = parts["unet"].weights[f"{name}.weight"].read()
        assert distance(result[f"{name}.weight"].read(), before + change.numpy().reshape(before.shape)) <= 1e-6


def test_differences_of_weights_and_biases(tmp_path: Path, pipeline: Pipelines) -> None:
    """LyCORIS' full differences and norms."""
    parts = parts_of(pipeline("sd15"))
    differences = {"conv_in": ("diff", "diff_b"), "conv_norm_out": ("w_norm", "b_norm")}
    tensors = {
        f"lora_unet_{module}.{role}": torch.ones(parts["unet"].weights[f"{module}.{tensor}"].shape)
        for module, roles in differences.items()
        for role, tensor in zip(roles, ("weight", "bias"), strict=True)
    }
    result = folded(parts, [(write(tmp_path / "lora.safetensors", tensors), 0.25)])
    for module in differences:
        for name in (f"{module}.weight", f"{module}.bias"):
            before = parts["unet"].weights[name].read()
            np.testing.assert_allclose(result["unet"].weights[name].read(), before + 0.25, rtol=1e-6)
    assert result["text_encoder"] is parts["text_encoder"]


@pytest.mark.parametrize("base", ["unet.base_model.model.", "base_model.model.", "unet.", ""])
def test_prefixes_of_peft(tmp_path: Path, pipeline: Pipelines, base: str) -> None:
    loaded = pipeline("sd15")
    lora = random_lora(loaded, seed=14, components=["unet"])
    same = write(tmp_path / "same.safetensors", peft(lora))
    path = write(
        tmp_path / "lora.safetensors",
        {base + key.removeprefix("unet.").replace("A.w", "A.default.w"): value for key, value in peft(lora).items()},
    )
    check(loaded, [(path, 1.0)], lora, same=[(same, 1.0)])


def test_text_encoders_with_and_without_their_wrapper(tmp_path: Path, pipeline: Pipelines) -> None:
    parts = parts_of(pipeline("sd15"))
    lora = random_lora(pipeline("sd15"), seed=15, components=["text_encoder"])
    wrapped = {key.replace("text_encoder.", "text_encoder.text_model."): value for key, value in peft(lora).items()}
    old = {f"text_model.{name}": weight for name, weight in parts["text_encoder"].weights.items()}
    variants = [parts["text_encoder"], replace(parts["text_encoder"], weights=old)]
    files = [write(tmp_path / f"{len(t)}{n}.safetensors", t) for n, t in enumerate((peft(lora), wrapped))]
    results = [
        [weight.read() for weight in folded({"text_encoder": part}, [(file, 1.0)])["text_encoder"].weights.values()]
        for part in variants
        for file in files
    ]
    assert len(results) == 4
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_settings_beside_a_file_of_peft(tmp_path: Path, pipeline: Pipelines) -> None:
    loaded = pipeline("sd15")
    lora = random_lora(loaded, seed=16, components=["unet"], rank=4, alpha=6)
    tensors = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in peft(lora).items()}
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    same = write(
        tmp_path / "same.safetensors",
        peft({"unet": {name: replace(f, up=f.up * 3, alpha=None) for name, f in lora["unet"].items()}}),
    )
    check(loaded, [(path, 1.0)], lora, same=[(same, 1.0)])


def test_linear_factors_for_a_convolution_of_one_pixel(tmp_path: Path, pipeline: Pipelines) -> None:
    """SD 1 has 1 x 1 convolutions where SD 2 has linear layers, and LoRAs hold either."""
    for family, flat in (("sd15", True), ("sd21", False)):
        loaded = pipeline(family)
        lora = random_lora(loaded, seed=17, components=["unet"], modules=PROJECTIONS)
        same = write(tmp_path / f"{family}-same.safetensors", peft(lora))
        tensors = {key: v.reshape(v.shape[:2] if flat else (*v.shape, 1, 1)) for key, v in kohya(lora).items()}
        check(loaded, [(write(tmp_path / f"{family}.safetensors", tensors), 1.0)], lora, same=[(same, 1.0)])


def test_several_are_rounded_once(tmp_path: Path, pipeline: Pipelines) -> None:
    """Weights in half precision: what is folded in is the sum in single precision, not a sum of rounded sums."""
    loaded = pipeline("sd15")
    parts = parts_of(loaded, torch.float16)
    files = []
    for seed in range(8):
        lora = random_lora(loaded, seed=20 + seed, components=["unet"])
        files.append((write(tmp_path / f"{seed}.safetensors", kohya(lora)), 1 / 64))
    key = next(iter(lora["unet"])) + ".weight"
    wanted = parts["unet"].weights[key].read().astype(np.float64)
    for path, _ in files:
        (result,) = (folded(parts, [(path, 1 / 64)])["unet"].weights[key],)
        wanted += result.read().astype(np.float64) - parts["unet"].weights[key].read()
    assert distance(folded(parts, files)["unet"].weights[key].read(), wanted) <= 2e-7


def test_nothing_is_read_before_it_is_wanted(tmp_path: Path, pipeline: Pipelines) -> None:
    lora = random_lora(pipeline("sd15"), seed=30, components=["unet"])
    path = write(tmp_path / "lora.safetensors", kohya(lora))

    def fail() -> Any:
        raise AssertionError("read")

    parts = parts_of(pipeline("sd15"))
    unet = parts["unet"]
    unread = {name: Weight(weight.shape, weight.dtype, fail) for name, weight in unet.weights.items()}
    result = fused({"unet": replace(unet, weights=unread)}, read_lora(path), scale=0.5)["unet"]
    with pytest.raises(AssertionError, match="read"):
        result.weights[next(iter(lora["unet"])) + ".weight"].read()
    (note,) = result.changes
    assert note == {
        "kind": "lora",
        "file": "lora.safetensors",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "scale": 0.5,
        "modules": len(lora["unet"]),
    }
