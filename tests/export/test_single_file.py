"""Single files against the diffusers checkpoints that they were written from."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ldm_layout
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.export.part_files import open_controlnet_file, open_vae_file
from latentrt.export.published_configs import published_configs
from latentrt.export.single_file import SingleFile, open_single_file
from latentrt.export.single_file_extras import is_extra
from latentrt.export.weights import Weights
from latentrt.runtime.errors import ArtifactError, ConfigError, LatentrtError, UsageError

FAMILIES = ("sd1", "sd2", "sdxl", "refiner")
V = "v_prediction"


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, ldm_layout.State]]:
    return {family: ldm_layout.family_states(family, ldm_layout.configs(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def originals(states: dict[str, dict[str, ldm_layout.State]]) -> dict[str, ldm_layout.State]:
    return {
        family: ldm_layout.single_file_state(family, parts, ldm_layout.configs(family))
        for family, parts in states.items()
    }


@pytest.fixture
def write(tmp_path: Path, originals: dict[str, ldm_layout.State]) -> Callable[..., Path]:
    """Writes a family's file: with other tensors, without some, with metadata."""

    def write_file(
        family: str,
        *,
        more: Mapping[str, torch.Tensor] | None = None,
        without: Callable[[str], bool] = lambda name: False,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        state = {name: tensor for name, tensor in originals[family].items() if not without(name)}
        return ldm_layout.write_file(tmp_path / "any name.safetensors", {**state, **(more or {})}, metadata)

    return write_file


def assert_same(found: Weights, expected: ldm_layout.State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name].read(), tensor.numpy(), err_msg=name, strict=True)


@pytest.mark.parametrize(
    ("family", "title", "pipeline", "scheduler"),
    [
        ("sd1", "Stable Diffusion 1", "StableDiffusionPipeline", "PNDMScheduler"),
        ("sd2", "Stable Diffusion 2", "StableDiffusionPipeline", "DDIMScheduler"),
        ("sdxl", "SDXL", "StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
        ("refiner", "SDXL refiner", "StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler"),
    ],
)
def test_a_file_is_the_checkpoint_that_it_was_written_from(
    write: Callable[..., Path],
    states: dict[str, dict[str, ldm_layout.State]],
    family: str,
    title: str,
    pipeline: str,
    scheduler: str,
) -> None:
    path = write(family)
    found = open_single_file(path, prediction_type=V if family == "sd2" else None)
    assert (found.family, found.model_index["_class_name"]) == (title, pipeline)
    assert found.scheduler_config["_class_name"] == found.model_index["scheduler"][1] == scheduler
    assert found.parts.keys() == states[family].keys()
    configs = ldm_layout.configs(family)
    for name, part in found.parts.items():
        assert_same(part.weights, states[family][name])
        assert (part.name, part.origin, part.files) == (name, path, {f"{name}/{path.name}": path})
        assert part.model_class == found.model_index[name][1]
        # OpenAI's encoder has no projection in Stable Diffusion, so that its width does not show.
        expected = {**configs[name], "projection_dim": part.config.get("projection_dim")}
        assert {**part.config, "projection_dim": expected["projection_dim"]} == expected
    tokenizers = {name.replace("text_encoder", "tokenizer") for name in states[family] if "text" in name}
    assert {name.partition("/")[0] for name in found.tokenizer_files} == tokenizers


def test_open_clips_tokenizers_pad_with_id_zero(write: Callable[..., Path]) -> None:
    files = open_single_file(write("sdxl")).tokenizer_files
    pads = {
        name: json.loads(files[f"{name}/tokenizer_config.json"])["pad_token"] for name in ("tokenizer", "tokenizer_2")
    }
    assert pads == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}


@pytest.mark.parametrize(
    ("family", "channels", "title", "pipeline", "scheduler"),
    [
        ("sd1", 9, "Stable Diffusion 1 inpainting", "StableDiffusionInpaintPipeline", "PNDMScheduler"),
        (
            "sd1",
            8,
            "Stable Diffusion 1 InstructPix2Pix",
            "StableDiffusionInstructPix2PixPipeline",
            "EulerAncestralDiscreteScheduler",
        ),
        ("sd2", 9, "Stable Diffusion 2 inpainting", "StableDiffusionInpaintPipeline", "DDIMScheduler"),
        ("sdxl", 9, "SDXL inpainting", "StableDiffusionXLInpaintPipeline", "EulerDiscreteScheduler"),
    ],
)
def test_input_channels_tell_what_a_model_is_for(
    write: Callable[..., Path],
    originals: dict[str, ldm_layout.State],
    family: str,
    channels: int,
    title: str,
    pipeline: str,
    scheduler: str,
) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    width = originals[family][name].shape[0]
    path = write(family, more={name: torch.ones(width, channels, 3, 3)})
    found = open_single_file(path, prediction_type="epsilon" if family == "sd2" else None)
    assert (found.family, found.model_index["_class_name"]) == (title, pipeline)
    assert found.scheduler_config["_class_name"] == found.model_index["scheduler"][1] == scheduler
    assert found.parts["unet"].config["in_channels"] == channels


def test_half_precision_and_names_of_old_trainers_are_read(
    write: Callable[..., Path], states: dict[str, dict[str, ldm_layout.State]]
) -> None:
    prefix = "cond_stage_model.transformer."
    old = {f"{prefix}{n.removeprefix('text_model.')}": t.half() for n, t in states["sd1"]["text_encoder"].items()}
    found = open_single_file(write("sd1", more=old, without=lambda name: name.startswith(prefix)))
    assert_same(found.parts["text_encoder"].weights, {n: t.half() for n, t in states["sd1"]["text_encoder"].items()})


EXTRAS = {
    "sd1": [
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
        "scale_factor",
        "model_ema.decay",
        "model_ema.diffusion_modelinput_blocks00weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.vision_model.encoder.layers.0.mlp.fc1.weight",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
        "first_stage_model.loss.logvar",
        "first_stage_model.model_ema.decay",
        "lora_unet_down_blocks_0.lora_up.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
        "global_step",
    ],
    "sd2": [
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.text_projection",
        "cond_stage_model.model.visual.conv1.weight",
    ],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
        "denoiser.sigmas",
    ],
}


@pytest.mark.parametrize("family", EXTRAS)
def test_what_is_known_to_draw_nothing_is_left_out(write: Callable[..., Path], family: str) -> None:
    path = write(family, more={name: torch.ones(2) for name in EXTRAS[family]})
    found = open_single_file(path, prediction_type="epsilon")
    assert not any(name in part.weights for part in found.parts.values() for name in EXTRAS[family])
    if family == "sd1":
        assert found.notes == (
            "left out: 3 tensors of a running average (EMA) of the weights",
            "left out: 2 tensors of a LoRA that is not merged into the weights",
        )


def test_no_weight_of_any_family_counts_as_an_extra(originals: dict[str, ldm_layout.State]) -> None:
    assert not [name for state in originals.values() for name in state if is_extra(name)]


def test_stable_diffusion_2_leaves_out_its_encoders_last_layer(tmp_path: Path) -> None:
    configs = ldm_layout.configs("sd2")
    configs["text_encoder"]["num_hidden_layers"] = 24
    states = ldm_layout.family_states("sd2", configs)
    path = ldm_layout.write_file(tmp_path / "x.safetensors", ldm_layout.single_file_state("sd2", states, configs))
    part = open_single_file(path, prediction_type=V).parts["text_encoder"]
    assert part.config["num_hidden_layers"] == 23
    last = "text_model.encoder.layers.23."
    assert_same(part.weights, {n: t for n, t in states["text_encoder"].items() if not n.startswith(last)})


def predicted(found: SingleFile) -> tuple[str, int]:
    return found.scheduler_config["prediction_type"], found.parts["unet"].config["sample_size"]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.prediction_type": "v"}, (V, 96)),
        ({"modelspec.prediction_type": "epsilon"}, ("epsilon", 64)),
        ({"modelspec.predict_key": "v"}, (V, 96)),
        ({"modelspec.predict_key": "epsilon"}, ("epsilon", 64)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, (V, 96)),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, ("epsilon", 64)),
    ],
)
def test_metadata_tell_the_prediction_type_of_stable_diffusion_2(
    write: Callable[..., Path], metadata: dict[str, str], expected: tuple[str, int]
) -> None:
    found = open_single_file(write("sd2", metadata=metadata))
    assert predicted(found) == expected
    assert found.notes == (f"prediction type: {expected[0]}, as the file's metadata {next(iter(metadata))} says",)


@pytest.mark.parametrize("metadata", [None, {"modelspec.prediction_type": "unknown"}])
def test_a_silent_file_of_stable_diffusion_2_is_asked_about(
    write: Callable[..., Path], metadata: dict[str, str] | None
) -> None:
    path = write("sd2", metadata=metadata)
    with pytest.raises(UsageError, match=r"--prediction-type: v_prediction for .*768.*epsilon for .*512"):
        open_single_file(path)
    assert predicted(open_single_file(path, prediction_type="epsilon")) == ("epsilon", 64)
    assert predicted(open_single_file(path, prediction_type=V)) == (V, 96)


def test_the_caller_goes_before_the_file_and_is_told(write: Callable[..., Path]) -> None:
    found = open_single_file(write("sd2", metadata={"modelspec.predict_key": "v"}), prediction_type="epsilon")
    assert predicted(found) == ("epsilon", 64)
    assert found.notes == (
        "prediction type: epsilon as asked for, though the file's metadata modelspec.predict_key says v_prediction",
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl", "refiner"])
def test_other_families_predict_noise_unless_told(write: Callable[..., Path], family: str) -> None:
    assert open_single_file(write(family)).scheduler_config["prediction_type"] == "epsilon"
    assert open_single_file(write(family), prediction_type=V).scheduler_config["prediction_type"] == V


def test_marks_of_velocity_and_zero_terminal_snr_are_taken_from_sdxl_files(write: Callable[..., Path]) -> None:
    marked = open_single_file(write("sdxl", more={"v_pred": torch.empty(0)})).scheduler_config
    assert (marked["prediction_type"], marked["timestep_spacing"]) == (V, "leading")
    assert "rescale_betas_zero_snr" not in marked
    both = open_single_file(write("sdxl", more={"v_pred": torch.empty(0), "ztsnr": torch.empty(0)})).scheduler_config
    assert (both["prediction_type"], both["timestep_spacing"]) == (V, "trailing")
    assert both["rescale_betas_zero_snr"] is True


def test_an_unknown_prediction_type_is_a_usage_error(write: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="expected one of epsilon, v_prediction, got 'velocity'"):
        open_single_file(write("sd1"), prediction_type="velocity")


def test_missing_and_unexpected_tensors_are_named_with_the_family(write: Callable[..., Path]) -> None:
    gone = "model.diffusion_model.output_blocks.3"
    more = {f"odd.{number:02}": torch.ones(1) for number in range(12)}
    with pytest.raises(ArtifactError) as caught:
        open_single_file(write("sd1", more=more, without=lambda name: name.startswith(gone)))
    said = str(caught.value)
    assert "weights of Stable Diffusion 1, which it was taken for" in said
    assert f"missing: '{gone}.0.emb_layers.1.bias'" in said
    assert said.count(gone) == 10
    assert "12 unexpected: 'odd.00', 'odd.01'" in said
    assert "'odd.09', …" in said
    assert "odd.10" not in said


ONE_EACH = {
    "sd1": [
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.middle_block.1.norm.bias",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.1.block.0.conv2.bias",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.2.mlp.fc1.weight",
    ],
    "sdxl": [
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",
    ],
}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in ONE_EACH.items() for name in names])
def test_any_one_missing_tensor_is_named(write: Callable[..., Path], family: str, name: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        open_single_file(write(family, without=lambda found: found == name))
    assert name.rpartition("model.")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["control_model.input_hint_block.0.weight"], "got a ControlNet. .*--controlnet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "got a ControlNet. .*--controlnet"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "got a LoRA. .*--lora"),
        (["first_stage_model.encoder.conv_in.weight"], "got a VAE alone. .*--vae"),
        (["encoder.conv_in.weight"], "got a VAE alone. .*--vae"),
        (["down_blocks.0.resnets.0.conv1.weight"], "got a U-Net alone"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "got Flux"),
        (["model.diffusion_model.joint_blocks.0.x"], "got Stable Diffusion 3"),
        (["model.diffusion_model.input_blocks.0.0.weight", "edm_mean"], "got Playground 2.5"),
        (["model.diffusion_model.input_blocks.0.0.weight", "edm_vpred.sigma_max"], "got CosXL"),
        (["something"], "got 1 tensors such as 'something'"),
    ],
)
def test_files_of_other_things_are_named(tmp_path: Path, names: list[str], said: str) -> None:
    path = ldm_layout.write_file(tmp_path / "sd15.safetensors", {name: torch.ones(1) for name in names})
    with pytest.raises(LatentrtError, match=said):
        open_single_file(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unet_alone_is_told_what_is_missing(write: Callable[..., Path], family: str) -> None:
    path = write(family, without=lambda name: not name.startswith("model.diffusion_model."))
    prefix = next(iter(ldm_layout.ENCODERS[family].values()))
    with pytest.raises(ArtifactError, match=rf"without text encoders \(.*{prefix}.*\) and a VAE"):
        open_single_file(path)


def test_a_unet_of_published_width_alone_is_told_its_family(tmp_path: Path) -> None:
    attention = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    state = {attention: torch.ones(640, 2048)}
    with pytest.raises(ArtifactError, match="got one of SDXL without text encoders"):
        open_single_file(ldm_layout.write_file(tmp_path / "x.safetensors", state))


def test_a_checkpoint_without_a_vae_is_told_so(write: Callable[..., Path]) -> None:
    path = write("sdxl", without=lambda name: name.startswith("first_stage_model."))
    with pytest.raises(ArtifactError, match="got one of SDXL without a VAE"):
        open_single_file(path)


def test_an_encoder_of_other_tokens_is_refused(write: Callable[..., Path]) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    with pytest.raises(ConfigError, match="text_encoder of CLIP's 49408 tokens, got one of 49410"):
        open_single_file(write("sd1", more={name: torch.ones(49410, 64)}))


def test_a_folders_configs_go_before_the_published_ones(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    unet = {**ldm_layout.configs("sd2")["unet"], "upcast_attention": False}
    scheduler = {**published_configs("sd2")["scheduler"], "_class_name": "EulerDiscreteScheduler"}
    for name, config in {"unet/config.json": unet, "scheduler/scheduler_config.json": scheduler}.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(config))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/merges.txt").write_text("own")
    found = open_single_file(write("sd2"), config=folder)
    assert found.parts["unet"].config == unet
    assert found.parts["unet"].files["unet/config.json"] == folder / "unet/config.json"
    assert found.scheduler_config == scheduler
    assert found.model_index["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    assert found.tokenizer_files == {"tokenizer/merges.txt": b"own"}
    assert found.parts["vae"].config == ldm_layout.configs("sd2")["vae"]


@pytest.mark.parametrize("shape", [(), (3,), (0, 0, 0, 0), (2, 2, 2, 2, 2)])
def test_tensors_of_odd_shapes_are_errors_and_nothing_else(
    write: Callable[..., Path], originals: dict[str, ldm_layout.State], shape: tuple[int, ...]
) -> None:
    for name in ("input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"):
        with pytest.raises(ArtifactError):
            open_single_file(write("sd1", more={f"model.diffusion_model.{name}": torch.ones(shape)}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_fuzzed_names_and_shapes_give_a_checkpoint_or_an_error(
    tmp_path: Path, originals: dict[str, ldm_layout.State], data: st.DataObject, family: str
) -> None:
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in originals[family].items()}
    changed = data.draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=3, unique=True))
    for name in changed:
        shape = shapes.pop(name)
        other = data.draw(st.none() | st.lists(st.sampled_from([0, 1, 3, 64, 200]), max_size=4))
        number = data.draw(st.none() | st.sampled_from([0, 7, 99, 10**20]))
        renamed = name if number is None else re.sub(r"\d+", str(number), name, count=1)
        if other is not None or number is not None:
            shapes[renamed] = shape if other is None else other
    path = ldm_layout.write_shapes(tmp_path / "fuzz.safetensors", shapes)
    with contextlib.suppress(LatentrtError):
        assert open_single_file(path, prediction_type=V).parts.keys() >= {"unet", "vae"}


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_a_vae_file_takes_what_weights_do_not_show_from_the_vae_it_replaces(
    write: Callable[..., Path], states: dict[str, dict[str, ldm_layout.State]], tmp_path: Path, prefix: str
) -> None:
    checkpoint = open_single_file(write("sdxl"))
    state = ldm_layout.model("vae", ldm_layout.configs("sd1")["vae"], seed=9).state_dict()
    original = ldm_layout.to_ldm("vae", state, ldm_layout.configs("sd1")["vae"])
    path = ldm_layout.write_file(tmp_path / "vae.safetensors", {prefix + n: t for n, t in original.items()})
    part = open_vae_file(path, instead_of=checkpoint.parts["vae"])
    assert_same(part.weights, state)
    assert part.config == checkpoint.parts["vae"].config
    assert part.config["scaling_factor"] == 0.13025
    assert part.files == {"vae/vae.safetensors": path}


def test_a_vae_file_with_diffusers_names_is_read(write: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_single_file(write("sd1"))
    state = ldm_layout.model("vae", ldm_layout.configs("sd1")["vae"], seed=9).state_dict()
    part = open_vae_file(ldm_layout.write_file(tmp_path / "vae.safetensors", state), instead_of=checkpoint.parts["vae"])
    assert_same(part.weights, state)
    assert part.config == checkpoint.parts["vae"].config


def test_a_vae_inside_a_checkpoint_is_read_and_training_left_out(
    write: Callable[..., Path], states: dict[str, dict[str, ldm_layout.State]]
) -> None:
    checkpoint = open_single_file(write("sd1"))
    path = write("sdxl", more={"first_stage_model.loss.logvar": torch.ones(1)})
    assert_same(open_vae_file(path, instead_of=checkpoint.parts["vae"]).weights, states["sdxl"]["vae"])


def test_a_file_without_a_vae_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = open_single_file(write("sd1"))
    path = ldm_layout.write_file(tmp_path / "vae.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ArtifactError, match=r"vae\.safetensors"):
        open_vae_file(path, instead_of=checkpoint.parts["vae"])


@pytest.mark.parametrize("layout", ["control_model.", "", "diffusers"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_controlnet_file_is_read_in_any_layout(tmp_path: Path, family: str, layout: str) -> None:
    shared = (
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "attention_head_dim",
        "use_linear_projection",
        "transformer_layers_per_block",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "layers_per_block",
    )
    unet = ldm_layout.configs(family)["unet"]
    config = {option: unet[option] for option in shared if option in unet}
    state = ldm_layout.model("controlnet", config).state_dict()
    if layout == "diffusers":
        written = state
    else:
        written = {layout + n: t for n, t in ldm_layout.to_ldm("controlnet", state, config).items()}
    path = ldm_layout.write_file(tmp_path / "control.safetensors", written)
    part = open_controlnet_file("controlnet_2", path)
    assert (part.name, part.model_class, part.files) == (
        "controlnet_2",
        "ControlNetModel",
        {"controlnet_2/control.safetensors": path},
    )
    assert_same(part.weights, state)
    assert {option: part.config.get(option) for option in config} == config
    with pytest.raises(ArtifactError, match=r"weights of a ControlNet.*1 unexpected: 'task_embedding'"):
        open_controlnet_file(
            "controlnet",
            ldm_layout.write_file(
                path, {**written, f"{'' if layout == 'diffusers' else layout}task_embedding": torch.ones(1)}
            ),
        )


def test_what_is_no_controlnet_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(ArtifactError, match="expected a ControlNet, with diffusers' or the original names"):
        open_controlnet_file("controlnet", write("sd1"))


def test_a_folder_is_written_as_the_file_that_is_read(tmp_path: Path) -> None:
    configs: dict[str, Any] = ldm_layout.configs("sd1")
    for part in ("unet", "vae", "text_encoder"):
        ldm_layout.model(part, configs[part]).save_pretrained(tmp_path / part)
        (tmp_path / part / "config.json").write_text(json.dumps(configs[part]))
    path = ldm_layout.write_single_file(tmp_path, tmp_path / "x.safetensors", "sd1")
    found = open_single_file(path)
    for part, opened in found.parts.items():
        assert_same(opened.weights, ldm_layout.state_of(part, ldm_layout.model(part, configs[part])))
