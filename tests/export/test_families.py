"""Every supported family, exported from a tiny checkpoint with its published configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from families import FAMILIES, Sources, sd15
from safetensors.torch import load_file

from latentrt.export import graph_builder, graph_files
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.component import Component
from latentrt.export.export_plan import graph_path
from latentrt.export.exporter import export_checkpoint
from latentrt.export.graph_files import files_of, save_onnx, save_sharing
from latentrt.export.networks import libraries_quiet
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.errors import ArtifactError, ConfigError
from latentrt.runtime.latent_preview import LATENT_RGB_FILE, LatentRgb
from latentrt.runtime.manifest import load_manifest
from latentrt.runtime.session import OnnxSession

Bundles = Callable[[str], Path]
Checkpoints = Callable[[str], Sources]

BOUND = 1e-5
TEXT = ["text_encoder"]
BOTH = ["text_encoder", "text_encoder_2"]
VAE = ["vae_decoder", "vae_encoder"]
COMPONENTS = {
    **{name: [*TEXT, "unet", *VAE] for name in ("sd15", "sd21", "sd15_inpaint", "instruct_pix2pix", "lcm")},
    "bk_sdm_tiny": [*TEXT, "unet", *VAE],
    **{name: [*BOTH, "unet", *VAE] for name in ("sdxl_base", "sdxl_turbo", "sdxl_inpaint")},
    **{name: [*BOTH, "unet", *VAE] for name in ("lcm_sdxl", "ssd_1b", "koala")},
    "sd15_checked": [*TEXT, "unet", *VAE, "safety_checker"],
    "sdxl_refiner": ["text_encoder_2", "unet", *VAE],
    "sd15_controlnet_pipeline": [*TEXT, "unet", "unet_control", "controlnet", *VAE],
    "sd15_control": [*TEXT, "unet", "unet_control", "controlnet", "controlnet_2", *VAE, "taesd_decoder"],
    "sdxl_control": [*BOTH, "unet", "unet_control", "controlnet", *VAE, "taesd_decoder"],
}
LATENTS = ("batch", 4, "latent_height", "latent_width")
RESIDUALS = [
    ("batch", 16, "latent_height", "latent_width"),
    ("batch", 16, "latent_height", "latent_width"),
    ("batch", 16, "latent_height_2", "latent_width_2"),
    ("batch", 32, "latent_height_2", "latent_width_2"),
    ("batch", 32, "latent_height_2", "latent_width_2"),
]


def relative_l2(reference: Any, found: Any) -> float:
    wanted = np.asarray(reference, np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def model(model_class: Any, folder: Path) -> Any:
    with libraries_quiet():
        return model_class.from_pretrained(folder).eval()


def rows(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[i : i + 1] for name, value in tensors.items()} for i in range(len(tensors["sample"]))]


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in tensors.items()}


def unet_inputs(unet: Any, batch: int, height: int, width: int, length: int = 77) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(height)
    config = unet.config
    inputs = {
        "sample": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.tensor([981.0, 1.0, 500.5])[:batch],
        "encoder_hidden_states": torch.randn(batch, length, config.cross_attention_dim, generator=generator),
    }
    if config.addition_embed_type:
        ids = (config.projection_class_embeddings_input_dim - 32) // 8
        inputs["text_embeds"] = torch.randn(batch, 32, generator=generator)
        inputs["time_ids"] = torch.randint(0, 1024, (batch, ids), generator=generator).float()
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = torch.randn(batch, 256, generator=generator)
    return inputs


@torch.no_grad()
def predict(unet: Any, inputs: dict[str, torch.Tensor], residuals: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Row by row through diffusers, each with its scalar timestep."""
    out = []
    for index, row in enumerate(rows(inputs)):
        added = {"text_embeds": row["text_embeds"], "time_ids": row["time_ids"]} if "time_ids" in row else None
        extra = [residual[index : index + 1] for residual in residuals or []]
        out.append(
            unet(
                row["sample"],
                row["timestep"][0],
                row["encoder_hidden_states"],
                timestep_cond=row.get("timestep_cond"),
                added_cond_kwargs=added,
                down_block_additional_residuals=tuple(extra[:-1]) or None,
                mid_block_additional_residual=extra[-1] if extra else None,
            ).sample
        )
    return torch.cat(out)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_bundle_holds_the_familys_components_configs_and_parity(
    name: str, family_bundle: Bundles, family_sources: Checkpoints
) -> None:
    bundle, source = family_bundle(name), family_sources(name)
    manifest = load_manifest(bundle)
    assert [artifact.component for artifact in manifest.artifacts] == COMPONENTS[name]
    open_bundle(bundle).check()
    for artifact in manifest.artifacts:
        assert 0 < artifact.parity["worst_relative_l2"] <= BOUND
        assert artifact.parity["check"] == "full"
        cases = artifact.parity.keys() - {"worst_relative_l2", "check"}
        if artifact.component.startswith(("unet", "controlnet")):
            assert {"one row", "154 embeddings", "another size", "mixed timesteps"} < cases
        else:
            assert len(cases) == 2
    for component in {*COMPONENTS[name]} - {"unet_control"}:
        part = {"vae_decoder": "vae", "vae_encoder": "vae"}.get(component, component)
        folder = {
            "taesd_decoder": source.taesd,
            **dict(zip(("controlnet", "controlnet_2"), source.controlnets, strict=False)),
        }
        original = (folder.get(part) or source.path / part) / "config.json"
        assert (bundle / component / "config.json").read_bytes() == original.read_bytes()
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (bundle / file).read_bytes() == (source.path / file).read_bytes()
    for encoder in {*COMPONENTS[name]} & {*BOTH}:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        assert (bundle / tokenizer / "vocab.json").read_bytes() == (source.path / tokenizer / "vocab.json").read_bytes()
    assert (bundle / "tokenizer_2").exists() == ("text_encoder_2" in COMPONENTS[name])


@pytest.mark.parametrize(
    ("name", "channels", "text", "extra"),
    [
        ("sd15", 4, 32, {}),
        ("sd21", 4, 32, {}),
        ("sd15_inpaint", 9, 32, {}),
        ("instruct_pix2pix", 8, 32, {}),
        ("lcm", 4, 32, {"timestep_cond": ("batch", 256)}),
        ("bk_sdm_tiny", 4, 32, {}),
        ("ssd_1b", 4, 64, {"text_embeds": ("batch", 32), "time_ids": ("batch", 6)}),
        ("koala", 4, 64, {"text_embeds": ("batch", 32), "time_ids": ("batch", 6)}),
        (
            "lcm_sdxl",
            4,
            64,
            {"text_embeds": ("batch", 32), "time_ids": ("batch", 6), "timestep_cond": ("batch", 256)},
        ),
        ("sdxl_base", 4, 64, {"text_embeds": ("batch", 32), "time_ids": ("batch", 6)}),
        ("sdxl_inpaint", 9, 64, {"text_embeds": ("batch", 32), "time_ids": ("batch", 6)}),
        ("sdxl_refiner", 4, 32, {"text_embeds": ("batch", 32), "time_ids": ("batch", 5)}),
    ],
)
def test_a_unet_has_its_familys_inputs_and_answers_as_diffusers_does(
    name: str, channels: int, text: int, extra: dict[str, Any], family_bundle: Bundles, family_sources: Checkpoints
) -> None:
    session = OnnxSession(family_bundle(name) / "unet/model.onnx")
    assert {tensor.name: tensor.shape for tensor in session.spec.inputs} == {
        "sample": ("batch", channels, *LATENTS[2:]),
        "timestep": ("batch",),
        "encoder_hidden_states": ("batch", "sequence_length", text),
        **extra,
    }
    assert [(tensor.name, tensor.shape) for tensor in session.spec.outputs] == [("out_sample", LATENTS)]
    assert {tensor.dtype for tensor in (*session.spec.inputs, *session.spec.outputs)} == {"float32"}
    unet = model(diffusers.UNet2DConditionModel, family_sources(name).path / "unet")
    for batch, height, width, length in ((1, 8, 8, 77), (3, 4, 10, 154), (2, 7, 5, 77)):
        inputs = unet_inputs(unet, batch, height, width, length)
        assert relative_l2(predict(unet, inputs), session(arrays(inputs))["out_sample"]) <= BOUND


@pytest.mark.parametrize("name", ["sdxl_base", "lcm", "sd15_inpaint", "lcm_sdxl"])
def test_every_input_of_a_unet_changes_its_answer(
    name: str, family_bundle: Bundles, family_sources: Checkpoints
) -> None:
    unet = model(diffusers.UNet2DConditionModel, family_sources(name).path / "unet")
    session = OnnxSession(family_bundle(name) / "unet/model.onnx")
    inputs = arrays(unet_inputs(unet, 2, 8, 8))
    answer = session(inputs)["out_sample"]
    for key, value in inputs.items():
        changed = session({**inputs, key: value[::-1]})["out_sample"]
        assert relative_l2(answer, changed) > 1e-3, key


def test_the_second_text_encoder_returns_projection_and_every_state(
    family_bundle: Bundles, family_sources: Checkpoints
) -> None:
    folder = family_sources("sdxl_base").path
    encoder = model(transformers.CLIPTextModelWithProjection, folder / "text_encoder_2")
    tokenizer = model_tokenizer(folder / "tokenizer_2")
    ids = tokenizer(["a red circle", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert ids[1, 2] == 0  # "!" pads
    with torch.no_grad():
        out = encoder(ids, output_hidden_states=True)
    session = OnnxSession(family_bundle("sdxl_base") / "text_encoder_2/model.onnx")
    found = session({"input_ids": ids.numpy()})
    assert session.spec.inputs[0].dtype == "int64"
    assert list(found) == ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(5))]
    for value, reference in zip(found.values(), (out.text_embeds, out[1], *out.hidden_states), strict=True):
        assert relative_l2(reference, value) <= BOUND
    assert not np.allclose(found["last_hidden_state"], found["hidden_states.4"])


def model_tokenizer(folder: Path) -> Any:
    with libraries_quiet():
        return transformers.CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def control(net: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    found = []
    for row in rows(inputs):
        added = {"text_embeds": row["text_embeds"], "time_ids": row["time_ids"]} if "time_ids" in row else None
        down, mid = net(
            row["sample"],
            row["timestep"][0],
            row["encoder_hidden_states"],
            controlnet_cond=row["controlnet_cond"],
            conditioning_scale=float(row["conditioning_scale"]),
            added_cond_kwargs=added,
            return_dict=False,
        )
        found.append([*down, mid])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(("name", "count"), [("sd15_control", 2), ("sdxl_control", 1)])
def test_controlnets_and_their_unet_answer_as_diffusers_does(
    name: str, count: int, family_bundle: Bundles, family_sources: Checkpoints
) -> None:
    bundle, source = family_bundle(name), family_sources(name)
    unet = model(diffusers.UNet2DConditionModel, source.path / "unet")
    session = OnnxSession(bundle / "unet/control.onnx")
    names = [*(f"down_block_additional_residual_{i}" for i in range(4)), "mid_block_additional_residual"]
    assert [(t.name, t.shape) for t in session.spec.inputs][-5:] == list(zip(names, RESIDUALS, strict=True))
    inputs = unet_inputs(unet, 3, 7, 10, 154)
    generator = torch.Generator().manual_seed(1)
    hints = {
        "controlnet_cond": torch.rand(3, 3, 56, 80, generator=generator),
        "conditioning_scale": torch.tensor([0.0, 0.5, 1.5]),
    }
    total = [torch.zeros(())] * 5
    for number in range(count):
        component = "controlnet" if number == 0 else f"controlnet_{number + 1}"
        net = model(diffusers.ControlNetModel, source.controlnets[number])
        graph = OnnxSession(bundle / component / "model.onnx")
        expected = control(net, {**inputs, **hints})
        found = graph(arrays({**inputs, **hints}))
        outputs = [*(f"down_block_res_sample_{i}" for i in range(4)), "mid_block_res_sample"]
        assert [(t.name, t.shape) for t in graph.spec.outputs] == list(zip(outputs, RESIDUALS, strict=True))
        assert [tensor.name for tensor in graph.spec.inputs][-2:] == ["controlnet_cond", "conditioning_scale"]
        for reference, value in zip(expected, found.values(), strict=True):
            assert not value[0].any()  # a scale of zero
            assert relative_l2(reference, value) <= BOUND
        total = [have + more for have, more in zip(total, expected, strict=True)]
    steered = session({**arrays(inputs), **arrays(dict(zip(names, total, strict=True)))})["out_sample"]
    plain = OnnxSession(bundle / "unet/model.onnx")(arrays(inputs))["out_sample"]
    assert relative_l2(predict(unet, inputs, total), steered) <= BOUND
    assert relative_l2(plain[0], steered[0]) <= BOUND
    assert relative_l2(plain[1:], steered[1:]) > 0.05


def test_a_taesd_decodes_scaled_latents(family_bundle: Bundles, family_sources: Checkpoints) -> None:
    folder = family_sources("sd15_control").taesd
    assert folder is not None
    taesd = model(diffusers.AutoencoderTiny, folder)
    session = OnnxSession(family_bundle("sd15_control") / "taesd_decoder/model.onnx")
    latents = torch.randn(3, 4, 5, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = taesd.decode(latents).sample
    found = session({"latent_sample": latents.numpy()})["sample"]
    assert found.shape == (3, 3, 40, 72)
    assert relative_l2(expected, found) <= BOUND


@pytest.mark.parametrize("name", ["sdxl_control"])
def test_every_component_converts_to_fp16(
    name: str, family_bundle: Bundles, family_sources: Checkpoints, tmp_path: Path
) -> None:
    bundle, source = Path(shutil.copytree(family_bundle(name), tmp_path / "b")), family_sources(name)
    lines = export_checkpoint(open_checkpoint(source.path, controlnets=source.controlnets, taesd=source.taesd), bundle)
    status = {(line.artifact.component, line.artifact.precision): line.status for line in lines}
    assert status == {
        (component, precision): "up to date" if precision == "fp32" else "exported"
        for component in COMPONENTS[name]
        for precision in ("fp32", "fp16")
    }
    manifest = load_manifest(bundle)
    for component in COMPONENTS[name]:
        full, half = manifest.artifact(component, "fp32"), manifest.artifact(component, "fp16")
        assert full is not None
        assert half is not None
        assert 2.8e-4 < half.parity["worst_relative_l2"] <= 5e-3
        assert half.path == full.path.replace(".onnx", ".fp16.onnx")
        assert OnnxSession(bundle / half.path).spec == OnnxSession(bundle / full.path).spec
    open_bundle(bundle).check()


def test_the_command_takes_controlnets_and_a_taesd(
    family_bundle: Bundles, family_sources: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, source = (
        Path(shutil.copytree(family_bundle("sd15_control"), tmp_path / "b")),
        family_sources("sd15_control"),
    )
    words = [
        "export",
        str(source.path),
        "-o",
        str(bundle),
        "--precision",
        "fp32",
        "--json",
        "--taesd",
        str(source.taesd),
    ]
    for folder in source.controlnets:
        words += ["--controlnet", str(folder)]
    assert main(words) == 0
    artifacts = json.loads(capsys.readouterr().out)["artifacts"]
    assert [(line["component"], line["status"]) for line in artifacts] == [
        (component, "up to date") for component in COMPONENTS["sd15_control"]
    ]
    # Without them, they stay: the U-Net is the same.
    export_checkpoint(source.path, bundle, precisions=["fp32"])
    assert [artifact.component for artifact in load_manifest(bundle).artifacts] == COMPONENTS["sd15_control"]
    open_bundle(bundle).check()


def traced_already(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    """Take the graphs of another bundle instead of tracing."""

    def load(component: Component, *, opset: int, cache: Path | None = None) -> ir.Model:
        return ir.load(bundle / graph_path(component.spec.name, "fp32"))

    monkeypatch.setattr(graph_builder, "to_onnx", load)


def test_what_belonged_to_another_checkpoint_goes(
    family_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(family_bundle("sdxl_control"), tmp_path / "b"))
    traced_already(monkeypatch, family_bundle("sd15"))
    export_checkpoint(sd15(tmp_path / "sd15"), bundle, precisions=["fp32"])
    assert [artifact.component for artifact in load_manifest(bundle).artifacts] == COMPONENTS["sd15"]
    left = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert not any(name.startswith(("controlnet", "text_encoder_2", "tokenizer_2", "taesd")) for name in left)
    assert "unet/control.onnx" not in left
    open_bundle(bundle).check()


def test_an_image_encoder_is_left_out_and_named(
    family_bundle: Bundles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sd15(tmp_path / "c")
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (folder / "model_index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.left_out == ("image_encoder",)
    assert list(checkpoint.components) == COMPONENTS["sd15"]
    shutil.copytree(family_bundle("sd15"), tmp_path / "b")
    words = ["export", str(folder), "-o", str(tmp_path / "b"), "--precision", "fp32"]
    assert main(words) == 0
    assert "left out: image_encoder" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == ["image_encoder"]


def test_the_safety_checker_comes_with_its_preprocessing(family_bundle: Bundles, family_sources: Checkpoints) -> None:
    bundle, source = family_bundle("sd15_checked"), family_sources("sd15_checked")
    assert open_checkpoint(source.path).left_out == ()
    name = "feature_extractor/preprocessor_config.json"
    assert name in load_manifest(bundle).files
    assert (bundle / name).read_bytes() == (source.path / name).read_bytes()


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(folder, to))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cross_attention_dim": 64}, "cross_attention_dim 32, as the U-Net's, got 64"),
        ({"block_out_channels": [16, 64]}, r"block_out_channels \[16, 32\], as the U-Net's, got \[16, 64\]"),
        ({"global_pool_conditions": True}, "global_pool_conditions.*got True"),
        ({"in_channels": 9}, "in_channels 4, .*got 9"),
        ({"conditioning_embedding_out_channels": [4, 8]}, r"divide pictures by 8.*got \[4, 8\]"),
        ({"_class_name": "ControlNetUnionModel"}, "expected ControlNetModel, got ControlNetUnionModel"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused_by_its_option(
    changes: dict[str, Any], said: str, family_sources: Checkpoints, tmp_path: Path
) -> None:
    source = family_sources("sd15_control")
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(source.path, controlnets=[edited(source.controlnets[0], tmp_path / "cn", **changes)])


def test_what_is_no_controlnet_or_taesd_is_refused(family_sources: Checkpoints, tmp_path: Path) -> None:
    source = family_sources("sd15_control")
    assert source.taesd is not None
    with pytest.raises(ConfigError, match="expected ControlNetModel, got AutoencoderTiny"):
        open_checkpoint(source.path, controlnets=[source.taesd])
    with pytest.raises(ArtifactError, match="expected the folder of a ControlNetModel"):
        open_checkpoint(source.path, controlnets=[tmp_path])
    with pytest.raises(ConfigError, match="latent_channels 4, as the VAE's, got 16"):
        open_checkpoint(source.path, taesd=edited(source.taesd, tmp_path / "t", latent_channels=16))


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("unet", {"projection_class_embeddings_input_dim": 83}, "projection_class_embeddings_input_dim.*got 83"),
        ("unet", {"addition_embed_type": None}, "addition_embed_type.*None with one"),
        ("unet", {"in_channels": 8}, "in_channels of 4 or 9 for SDXL, got 8"),
        ("unet", {"addition_embed_type": "text_image"}, "got 'text_image'"),
    ],
)
def test_an_option_of_sdxl_that_cannot_be_expressed_is_named(
    part: str, changes: dict[str, Any], said: str, family_sources: Checkpoints, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(family_sources("sdxl_base").path, tmp_path / "c"))
    original = (folder / part).rename(tmp_path / part)
    edited(original, folder / part, **changes)
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(folder)


def test_the_unet_with_residuals_shares_the_unets_external_data(
    family_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_bundle("sd15_control") / "unet"
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 10_000)
    holder, path = tmp_path / "model.onnx", tmp_path / "control.onnx"
    save_onnx(ir.load(source / "model.onnx"), holder)
    files = save_sharing(ir.load(source / "control.onnx"), path, holder)
    assert list(files) == files_of(path) == [path, tmp_path / "model.onnx_data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["control.onnx", "model.onnx", "model.onnx_data"]
    assert 2 * path.stat().st_size < (source / "control.onnx").stat().st_size
    whole, split = OnnxSession(source / "control.onnx"), OnnxSession(path)
    generator = np.random.default_rng(0)
    sizes = {"batch": 2, "latent_height": 6, "latent_width": 8, "latent_height_2": 3, "latent_width_2": 4}
    feeds = {
        tensor.name: generator.standard_normal(
            [sizes.get(str(n), 77 if isinstance(n, str) else n) for n in tensor.shape]
        )
        for tensor in whole.spec.inputs
    }
    np.testing.assert_array_equal(split(feeds)["out_sample"], whole(feeds)["out_sample"])


def test_an_export_lists_the_shared_data_with_both_graphs(
    family_bundle: Bundles, family_sources: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, bundle = "sd15_controlnet_pipeline", tmp_path / "b"
    traced_already(monkeypatch, family_bundle(name))
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 100_000)
    export_checkpoint(family_sources(name).path, bundle)
    manifest = load_manifest(bundle)
    for precision, end in (("fp32", "onnx"), ("fp16", "fp16.onnx")):
        files = {a.component: list(a.files) for a in manifest.artifacts if a.precision == precision}
        assert files["unet"] == [f"unet/model.{end}", f"unet/model.{end}_data"]
        assert files["unet_control"] == [f"unet/control.{end}", f"unet/model.{end}_data"]
        assert files["text_encoder"] == [f"text_encoder/model.{end}", f"text_encoder/model.{end}_data"]
    open_bundle(bundle).check()
    # The control graphs alone, made again beside U-Nets that are up to date.
    whole = {path: path.read_bytes() for path in sorted((bundle / "unet").iterdir())}
    (bundle / "unet/control.onnx").unlink()
    (bundle / "unet/control.fp16.onnx").unlink()
    lines = export_checkpoint(family_sources(name).path, bundle)
    assert {line.artifact.component for line in lines if line.status == "exported"} == {"unet_control"}
    assert {path: path.read_bytes() for path in sorted((bundle / "unet").iterdir())} == whole


def test_without_external_data_or_with_other_weights_nothing_is_shared(
    family_bundle: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = family_bundle("sd15_control")
    path = tmp_path / "control.onnx"
    assert save_sharing(ir.load(bundle / "unet/control.onnx"), path, bundle / "unet/model.onnx") == (path,)
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 10_000)
    other = tmp_path / "model.onnx"
    save_onnx(ir.load(bundle / "vae_decoder/model.onnx"), other)
    files = save_sharing(ir.load(bundle / "unet/control.onnx"), path, other)
    assert files == (path, tmp_path / "control.onnx_data")


@pytest.mark.parametrize("name", ["sd15", "sdxl_base"])
def test_a_bundle_holds_the_colours_of_its_previews(name: str, family_bundle: Bundles) -> None:
    bundle = family_bundle(name)
    assert LATENT_RGB_FILE in load_manifest(bundle).files
    fitted = LatentRgb.from_json((bundle / LATENT_RGB_FILE).read_text())
    assert fitted.weights.shape == (4, 3)
    assert fitted.weights.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_every_time(name: str, family_sources: Checkpoints, tmp_path: Path) -> None:
    first, again = family_sources(name).path, FAMILIES[name](tmp_path / name)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            one, other = load_file(first / file), load_file(again / file)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
