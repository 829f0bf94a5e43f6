"""Tiny random-weight checkpoints of every supported family, in diffusers' own layout.

Each has its family's published configuration with narrower, fewer layers: what makes the family what it is (input
channels, conditioning, prediction type, noise schedule, token ids) is kept. The same seed gives the same weights, and
the weights are scaled so that outputs have about unit size and answer to every input.

    from families import FAMILIES, sdxl_base
    folder = sdxl_base(tmp_path / "checkpoint")
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tiny import END, VAE_CONFIG, _vocabulary, write_tiny_tokenizer
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WIDTH = 32  # of every text encoder
SD_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
SD21_UNET: dict[str, Any] = {
    **SD_UNET,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL_UNET: dict[str, Any] = {
    **SD_UNET,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}
REFINER_UNET: dict[str, Any] = {
    **SDXL_UNET,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": [2, 4, 4],
    "transformer_layers_per_block": 1,
    "projection_class_embeddings_input_dim": WIDTH + 5 * 8,
}
# Pruned: nothing in the middle and no stage without attention.
BK_TINY_UNET: dict[str, Any] = {
    **SD_UNET,
    "mid_block_type": None,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
# Transformers counted one by one, other ones on the way up, and one ResNet block in the middle.
SSD_1B_UNET: dict[str, Any] = {
    **SDXL_UNET,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2]],
    "reverse_transformer_layers_per_block": [[2, 1], 1],
}
KOALA_UNET: dict[str, Any] = {**SDXL_UNET, "mid_block_type": None}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH,
    # As published: 2 is not the end token's id, and makes transformers pool at the largest id instead.
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
# OpenCLIP's encoders, those of SD 2 and the second one of SDXL.
OPEN_CLIP_TEXT: dict[str, Any] = {**TEXT, "hidden_act": "gelu", "num_hidden_layers": 4}
BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SDXL_EULER: dict[str, Any] = {
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
# Options of other schedulers that published configs carry along, and that the scheduler named there does not have.
LEFTOVERS: dict[str, Any] = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "trained_betas": None,
}
SDXL_VAE: dict[str, Any] = {**VAE_CONFIG, "scaling_factor": 0.13025, "force_upcast": True}
SD_VAE: dict[str, Any] = {**VAE_CONFIG, "scaling_factor": 0.18215}
# As published with Stable Diffusion 1.5.
PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
    "use_square_size": False,
}
NO_CHECKER: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the libraries' notes and progress bars."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
            yield
    finally:
        logging.disable(disabled)
        if bars:
            diffusers.utils.logging.enable_progress_bar()
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def _seeded(seed: int) -> Iterator[torch.Generator]:
    """torch's global generator seeded, and as before afterwards; yields another one.

    Each network is seeded for itself, so that families which share one have the same weights in it.
    """
    with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed + 1)


def _enliven(module: nn.Module, generator: torch.Generator) -> None:
    """Give every weight a part: biases and norms are moved, and what starts at zero (ControlNet) is filled."""
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        elif not parameter.any():
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


def _scale_output(convolution: nn.Conv2d, output: torch.Tensor, size: float) -> None:
    """Scale a network's last convolution so that its output has standard deviation `size` and no offset."""
    gain = size / output.std()
    convolution.weight.mul_(gain)
    if convolution.bias is not None:
        convolution.bias.copy_((convolution.bias - output.mean((0, 2, 3))) * gain)


def make_unet(config: Mapping[str, Any], *, seed: int) -> diffusers.UNet2DConditionModel:
    """A U-Net whose prediction has standard deviation 1 for unit noise."""
    with _seeded(seed) as generator:
        unet = diffusers.UNet2DConditionModel(**config).eval()
        _enliven(unet, generator)
        # Text that matters: what the cross-attention adds, as large as what it adds to.
        for name, parameter in unet.named_parameters():
            if ".attn2.to_out.0.weight" in name:
                parameter.mul_(4)
        sample = torch.randn(2, config["in_channels"], 8, 8, generator=generator)
        text = torch.randn(2, 77, config["cross_attention_dim"], generator=generator)
        added = None
        if config.get("addition_embed_type"):
            ids = (config["projection_class_embeddings_input_dim"] - WIDTH) // config["addition_time_embed_dim"]
            added = {"text_embeds": torch.randn(2, WIDTH, generator=generator), "time_ids": torch.full((2, ids), 64.0)}
        _scale_output(unet.conv_out, unet(sample, 500, text, added_cond_kwargs=added).sample, 1.0)
    return unet


def make_vae(config: Mapping[str, Any], *, seed: int) -> diffusers.AutoencoderKL:
    """A VAE of factor 8 whose pictures fill [-1, 1] and whose latents, scaled, have standard deviation 1."""
    factor = float(config["scaling_factor"])
    with _seeded(seed) as generator:
        vae = diffusers.AutoencoderKL(**config).eval()
        _enliven(vae, generator)
        latents = torch.randn(2, 4, 8, 8, generator=generator) / factor
        _scale_output(vae.decoder.conv_out, vae.decode(latents).sample, 0.5)
        mean = vae.encode(vae.decode(latents).sample.clamp(-1, 1)).latent_dist.mean
        gain = 1 / factor / mean.std()
        vae.quant_conv.weight[:4] *= gain
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean.mean((0, 2, 3))) * gain
        # The other half is the log variance, which has to stay small.
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -4.0
    return vae


def make_text_encoder(config: Mapping[str, Any], *, seed: int, projection: bool = False) -> Any:
    """A CLIP text encoder whose hidden states, also those before the final norm, have about unit size."""
    model_class = CLIPTextModelWithProjection if projection else CLIPTextModel
    with _seeded(seed) as generator:
        encoder = model_class(CLIPTextConfig(**{"vocab_size": len(_vocabulary()), **config})).eval()
        _enliven(encoder, generator)
        for name, parameter in encoder.named_parameters():
            if "embedding.weight" in name:
                parameter.mul_(0.7 / parameter.std())
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return encoder


def make_controlnet(unet: Mapping[str, Any], *, seed: int) -> Any:
    """A ControlNet to fit a U-Net's configuration, with residuals that move the prediction."""
    left_out = ("sample_size", "out_channels", "up_block_types")
    config = {name: value for name, value in unet.items() if name not in left_out}
    with _seeded(seed) as generator:
        controlnet = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(4, 8, 8, 16)).eval()
        _enliven(controlnet, generator)
        # Pictures that matter: layers that pass on what they are given, as the initial ones do not.
        embedding = controlnet.controlnet_cond_embedding
        for layer in (embedding.conv_in, *embedding.blocks):
            layer.weight.mul_(3)
        _scale_output(embedding.conv_out, embedding(torch.rand(2, 3, 64, 64, generator=generator)), 1.0)
    return controlnet


def make_taesd(*, seed: int) -> diffusers.AutoencoderTiny:
    """A TAESD whose pictures fill [-1, 1] for unit noise."""
    widths, blocks = (8,) * 4, (1,) * 4
    with _seeded(seed) as generator:
        taesd = diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks,
        ).eval()
        _enliven(taesd, generator)
        last = taesd.decoder.layers[-1]
        # The decoder ends with 2 x - 1.
        _scale_output(last, (taesd.decode(torch.randn(2, 4, 8, 8, generator=generator)).sample + 1) / 2, 0.25)
        last.bias.add_(0.5)
    return taesd


CHECKER_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 32,
    "image_size": 224,
    "hidden_act": "quick_gelu",
}


def make_safety_checker(*, seed: int) -> Any:
    """A safety checker with thresholds among its scores, so that some pictures pass and some do not."""
    with _seeded(seed) as generator:
        config = CLIPConfig(vision_config=CHECKER_VISION, projection_dim=WIDTH)
        checker = StableDiffusionSafetyChecker(config).eval()
        _enliven(checker.vision_model, generator)
        for concepts, thresholds, high in (
            (checker.special_care_embeds, checker.special_care_embeds_weights, 0.1),
            (checker.concept_embeds, checker.concept_embeds_weights, 0.3),
        ):
            concepts.copy_(torch.randn(concepts.shape, generator=generator))
            thresholds.copy_(high + 0.1 * torch.rand(thresholds.shape, generator=generator))
    return checker


def write_tokenizer(folder: Path, *, pad: str = END) -> Path:
    """Write the small CLIP tokenizer; OpenCLIP's pads with "!" (id 0)."""
    write_tiny_tokenizer(folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "pad_token": pad}))
    return folder


def _save(pipeline_class: Any, folder: Path, *, pads: Mapping[str, str], **parts: Any) -> Path:
    """Write a pipeline with tokenizers in vocab.json and merges.txt, the layout of published checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder.with_name(folder.name + "-tokenizers")
    with _quiet():
        tokenizers = {
            name: CLIPTokenizer.from_pretrained(write_tokenizer(scratch / name, pad=pad)) for name, pad in pads.items()
        }
        pipeline_class(**parts, **tokenizers).save_pretrained(folder, safe_serialization=True)
    for name, pad in pads.items():
        shutil.rmtree(folder / name)
        write_tokenizer(folder / name, pad=pad)
    shutil.rmtree(scratch, ignore_errors=True)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**LEFTOVERS, **json.loads(path.read_text())}, indent=2) + "\n")
    return folder


def _sd(
    folder: Path,
    *,
    seed: int,
    pipeline_class: Any = diffusers.StableDiffusionPipeline,
    unet: Mapping[str, Any] = SD_UNET,
    text: Mapping[str, Any] = TEXT,
    pad: str = END,
    scheduler: Any = None,
    **parts: Any,
) -> Path:
    if pipeline_class is not diffusers.LatentConsistencyModelPipeline:
        parts["image_encoder"] = None
    return _save(
        pipeline_class,
        folder,
        pads={"tokenizer": pad},
        text_encoder=make_text_encoder(text, seed=seed),
        vae=make_vae(SD_VAE, seed=seed),
        unet=make_unet(unet, seed=seed),
        scheduler=scheduler or _pndm(),
        **{**NO_CHECKER, **parts},
    )


def _pndm() -> Any:
    return diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)


def sd15(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 1.5."""
    return _sd(folder, seed=seed)


def sd15_checked(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 1.5 with its safety checker."""
    with _quiet():
        extractor = CLIPImageProcessorPil(**PREPROCESSOR)
    parts = {"safety_checker": make_safety_checker(seed=seed + 30), "requires_safety_checker": True}
    _sd(folder, seed=seed, feature_extractor=extractor, **parts)
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    return folder


def sd21(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 2.1: v-prediction, linear projections, heads by block, OpenCLIP's encoder."""
    scheduler = diffusers.DDIMScheduler(
        **BETAS, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    return _sd(folder, seed=seed, unet=SD21_UNET, text=OPEN_CLIP_TEXT, pad="!", scheduler=scheduler)


def sd_turbo(folder: Path, *, seed: int = 0) -> Path:
    """SD Turbo: the networks of 2.1 with epsilon prediction and a trailing schedule."""
    betas = {**SDXL_EULER, "timestep_spacing": "trailing"}
    scheduler = diffusers.EulerDiscreteScheduler(**betas)
    return _sd(folder, seed=seed, unet=SD21_UNET, text=OPEN_CLIP_TEXT, pad="!", scheduler=scheduler)


def bk_sdm_tiny(folder: Path, *, seed: int = 0) -> Path:
    """BK-SDM Tiny and Segmind's tiny-sd: 1.5 without its middle and its innermost stage; the Small ones keep that."""
    return _sd(folder, seed=seed, unet=BK_TINY_UNET)


def sd15_inpaint(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 1.5 inpainting: latents, mask and masked latents make 9 channels."""
    unet = {**SD_UNET, "in_channels": 9}
    return _sd(folder, seed=seed, unet=unet, pipeline_class=diffusers.StableDiffusionInpaintPipeline)


def instruct_pix2pix(folder: Path, *, seed: int = 0) -> Path:
    """InstructPix2Pix: latents and the picture's latents make 8 channels."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1)
    return _sd(
        folder,
        seed=seed,
        unet={**SD_UNET, "in_channels": 8},
        pipeline_class=diffusers.StableDiffusionInstructPix2PixPipeline,
        scheduler=scheduler,
    )


def lcm(folder: Path, *, seed: int = 0) -> Path:
    """A latent consistency model: the guidance scale is an input, embedded in 256 numbers."""
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50, clip_sample=False, set_alpha_to_one=True)
    return _sd(
        folder,
        seed=seed,
        unet={**SD_UNET, "time_cond_proj_dim": 256},
        pipeline_class=diffusers.LatentConsistencyModelPipeline,
        scheduler=scheduler,
    )


def _sdxl(
    folder: Path,
    *,
    seed: int,
    pipeline_class: Any = diffusers.StableDiffusionXLPipeline,
    unet: Mapping[str, Any] = SDXL_UNET,
    scheduler: Any = None,
    first_encoder: bool = True,
    **parts: Any,
) -> Path:
    return _save(
        pipeline_class,
        folder,
        pads={"tokenizer": END, "tokenizer_2": "!"} if first_encoder else {"tokenizer_2": "!"},
        text_encoder=make_text_encoder(TEXT, seed=seed) if first_encoder else None,
        text_encoder_2=make_text_encoder(OPEN_CLIP_TEXT, seed=seed, projection=True),
        vae=make_vae(SDXL_VAE, seed=seed),
        unet=make_unet(unet, seed=seed),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SDXL_EULER),
        **({} if first_encoder else {"tokenizer": None}),
        **parts,
    )


def sdxl_base(folder: Path, *, seed: int = 0) -> Path:
    """SDXL base: two text encoders, a pooled embedding and six sizes."""
    return _sdxl(folder, seed=seed, force_zeros_for_empty_prompt=True)


def sdxl_turbo(folder: Path, *, seed: int = 0) -> Path:
    """SDXL Turbo: the base's networks with a trailing ancestral schedule."""
    betas = {name: SDXL_EULER[name] for name in (*BETAS, "prediction_type", "steps_offset")}
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**betas, timestep_spacing="trailing")
    return _sdxl(folder, seed=seed, scheduler=scheduler, force_zeros_for_empty_prompt=True)


def sdxl_lightning(folder: Path, *, seed: int = 0) -> Path:
    """SDXL Lightning: the base's networks with a trailing schedule."""
    scheduler = diffusers.EulerDiscreteScheduler(**{**SDXL_EULER, "timestep_spacing": "trailing"})
    return _sdxl(folder, seed=seed, scheduler=scheduler, force_zeros_for_empty_prompt=True)


def lcm_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """LCM-SDXL: the guidance scale is an input, in SDXL's own pipeline."""
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50, clip_sample=False, set_alpha_to_one=True)
    unet = {**SDXL_UNET, "time_cond_proj_dim": 256}
    return _sdxl(folder, seed=seed, unet=unet, scheduler=scheduler, force_zeros_for_empty_prompt=True)


def ssd_1b(folder: Path, *, seed: int = 0) -> Path:
    """SSD-1B and Segmind Vega: SDXL with transformers removed one by one."""
    return _sdxl(folder, seed=seed, unet=SSD_1B_UNET, force_zeros_for_empty_prompt=True)


def koala(folder: Path, *, seed: int = 0) -> Path:
    """KOALA-700M: SDXL without its middle and with one layer a stage."""
    return _sdxl(folder, seed=seed, unet=KOALA_UNET, force_zeros_for_empty_prompt=True)


def sdxl_refiner(folder: Path, *, seed: int = 0) -> Path:
    """The SDXL refiner: the second text encoder only, four sizes and an aesthetic score."""
    return _sdxl(
        folder,
        seed=seed,
        pipeline_class=diffusers.StableDiffusionXLImg2ImgPipeline,
        unet=REFINER_UNET,
        first_encoder=False,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def sdxl_inpaint(folder: Path, *, seed: int = 0) -> Path:
    """SDXL inpainting: 9 channels."""
    return _sdxl(
        folder,
        seed=seed,
        pipeline_class=diffusers.StableDiffusionXLInpaintPipeline,
        unet={**SDXL_UNET, "in_channels": 9},
        force_zeros_for_empty_prompt=True,
    )


def controlnet(folder: Path, *, seed: int = 10, unet: Mapping[str, Any] = SD_UNET) -> Path:
    """A ControlNet in a folder of its own, to fit `sd15`."""
    return _save_model(make_controlnet(unet, seed=seed), folder)


def sdxl_controlnet(folder: Path, *, seed: int = 10) -> Path:
    """A ControlNet in a folder of its own, to fit `sdxl_base`."""
    return controlnet(folder, seed=seed, unet=SDXL_UNET)


def taesd(folder: Path, *, seed: int = 20) -> Path:
    """TAESD: an autoencoder of plain convolutions that takes scaled latents."""
    return _save_model(make_taesd(seed=seed), folder)


def _save_model(model: Any, folder: Path) -> Path:
    with _quiet():
        model.save_pretrained(folder, safe_serialization=True)
    return folder


def sd15_controlnet_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 1.5 with a ControlNet among its components."""
    part = make_controlnet(SD_UNET, seed=seed + 10)
    return _sd(folder, seed=seed, pipeline_class=diffusers.StableDiffusionControlNetPipeline, controlnet=part)


# Whole checkpoints by name.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd15": sd15,
    "sd15_checked": sd15_checked,
    "sd21": sd21,
    "sd_turbo": sd_turbo,
    "bk_sdm_tiny": bk_sdm_tiny,
    "sd15_inpaint": sd15_inpaint,
    "instruct_pix2pix": instruct_pix2pix,
    "lcm": lcm,
    "sd15_controlnet_pipeline": sd15_controlnet_pipeline,
    "sdxl_base": sdxl_base,
    "sdxl_turbo": sdxl_turbo,
    "sdxl_lightning": sdxl_lightning,
    "lcm_sdxl": lcm_sdxl,
    "ssd_1b": ssd_1b,
    "koala": koala,
    "sdxl_refiner": sdxl_refiner,
    "sdxl_inpaint": sdxl_inpaint,
}


@dataclass(frozen=True)
class Sources:
    """Folders that an export takes together, in the arguments of `export_checkpoint`."""

    path: Path
    controlnets: tuple[Path, ...] = ()
    taesd: Path | None = None


def write_sources(name: str, folder: Path) -> None:
    """Write a checkpoint of FAMILIES, or one with more beside it, in folders that `sources_in` finds.

    `sd15_control` is sd15 with two ControlNets and TAESD, `sdxl_control` sdxl_base with a ControlNet and TAESD.

    Args:
        name: of the checkpoint.
        folder: to make the checkpoint's folders in.
    """
    if name == "sd15_control":
        controlnet(folder / "controlnet")
        controlnet(folder / "controlnet_2", seed=12)
    if name == "sdxl_control":
        sdxl_controlnet(folder / "controlnet")
    if name.endswith("_control"):
        taesd(folder / "taesd")
    FAMILIES[{"sd15_control": "sd15", "sdxl_control": "sdxl_base"}.get(name, name)](folder / "checkpoint")


def sources_in(folder: Path) -> Sources:
    """What `write_sources` wrote."""
    controlnets = tuple(sorted(folder.glob("controlnet*")))
    tiny = folder / "taesd"
    return Sources(folder / "checkpoint", controlnets, tiny if tiny.exists() else None)
