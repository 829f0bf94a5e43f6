"""Train the shapes checkpoint: a small Stable Diffusion model of coloured shapes, from nothing.

Four stages, each resumable (run the same command again): `vae`, `text`, `unet`, then `save`, which writes
the diffusers folder. Every batch is a function of (seed, stage, step), so a run that was stopped and
resumed sees the data that an uninterrupted one would have seen.

    python examples/shapes/train.py --work build/shapes --out build/shapes-checkpoint

The text encoder is first trained to name the attributes that a prompt states and then frozen: the U-Net
meets embeddings that already tell the words apart, which saves most of its training time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from scenes import COLOURS, OFFSETS, PLACES, SHAPES, SIZES, Request, Scene, draw, random_prompt, random_scene
from tokenizer_files import write_tokenizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 48, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 128,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 64,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
NOISE_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
}
ATTRIBUTES = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "background": list(COLOURS),
    "size": list(SIZES),
    "place": list(PLACES),
}
STAGES = ("vae", "text", "unet", "save")


def batch_rng(seed: int, stage: str, step: int) -> np.random.Generator:
    """The random numbers of one training step, the same after a resume."""
    return np.random.default_rng([seed, STAGES.index(stage), step])


def pixels(scenes: list[Scene], rng: np.random.Generator) -> torch.Tensor:
    """Pictures of scenes as (b, 3, 128, 128) in [-1, 1]."""
    stack = np.stack([np.asarray(draw(scene, rng)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(scenes: list[Scene], rng: np.random.Generator, side: int) -> torch.Tensor:
    """Pictures cut to (b, 3, side, side) around a point on or near the shape, where there is something to learn."""
    cut = []
    for scene, image in zip(scenes, pixels(scenes, rng), strict=True):
        middle = np.array(PLACES[scene.place]) * OFFSETS[scene.size] + 64 + rng.normal(0, SIZES[scene.size], 2)
        x, y = np.clip(middle - side / 2, 0, 128 - side).astype(int)
        cut.append(image[:, y : y + side, x : x + side])
    return torch.stack(cut)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm-up, plateau, then a linear decay over the last third."""
    return peak * min(1.0, (step + 1) / 100, max(0.02, (total - step) / (total / 3)))


def save_state(path: Path, **state: Any) -> None:
    """Write a training checkpoint so that a kill leaves the old one or the new one."""
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def autocast(device: str) -> Any:
    """bfloat16 where it pays: on GPUs, and on CPUs whose matrix units have it."""
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def steps_left(state: dict[str, Any], total: int, optimizer: torch.optim.Optimizer, peak: float) -> Iterator[int]:
    """Count the remaining steps, setting each one's learning rate."""
    for step in range(int(state.get("step", 0)), total):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, peak)
        yield step


def load_state(path: Path, device: str) -> dict[str, Any]:
    """The training checkpoint at `path`, or an empty one."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else {}


def train_vae(work: Path, options: argparse.Namespace) -> AutoencoderKL:
    """Stage 1: L1 + L2 reconstruction through noisy latents, with a light KL term."""
    torch.manual_seed(options.seed)
    path, device = work / "vae.pt", options.device
    vae = AutoencoderKL(**VAE_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    state = load_state(path, device)
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def loss_of(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(device):
            posterior = vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            # A floor under the noise teaches the decoder to forgive the U-Net's small errors.
            noise = torch.maximum(std, 0.05 * mean.detach().std())
            decoded = vae.decode(mean + noise * torch.randn_like(mean)).sample.float()
        error = decoded - images
        kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
        return error.abs().mean() + 2 * error.square().mean() + 1e-4 * kl, error.detach().square().mean()

    step_loss: Callable[..., Any] = torch.compile(loss_of) if options.compile else loss_of
    started, running = time.time(), 0.0
    for step in steps_left(state, options.vae_steps, optimizer, 7e-4):
        rng = batch_rng(options.seed, "vae", step)
        torch.manual_seed(int(rng.integers(2**31)))
        # Crops cost a quarter each, so the first steps see twice the scenes in half the time.
        early = step < options.vae_crop_steps
        scenes = [random_scene(rng) for _ in range(options.vae_batch * (2 if early else 1))]
        images = crops(scenes, rng, 64) if early else pixels(scenes, rng)
        loss, mse = step_loss(images.to(device, memory_format=torch.channels_last))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = 0.95 * running + 0.05 * float(mse)
        if step % 50 == 0 or step == options.vae_steps - 1:
            psnr = 10 * np.log10(4 / max(running / (1 - 0.95 ** (step + 1 - state.get("step", 0))), 1e-9))
            print(f"vae {step} psnr {psnr:.2f} dB, {time.time() - started:.0f} s", flush=True)
        if step % 250 == 249 or step == options.vae_steps - 1:
            save_state(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return vae.eval()


def prompts_of(scenes: list[Scene], rng: np.random.Generator) -> list[Request]:
    """One random wording for each scene."""
    return [random_prompt(scene, rng) for scene in scenes]


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (b, 77), padded as Stable Diffusion pads them."""
    rows = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ids: torch.Tensor = rows.input_ids
    return ids


def train_text(work: Path, tokenizer: CLIPTokenizer, options: argparse.Namespace) -> CLIPTextModel:
    """Stage 2: name the attributes of a prompt from its last token, "not said" being one answer."""
    torch.manual_seed(options.seed + 1)
    path, device = work / "text.pt", options.device
    text = CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG)).to(device)
    heads = nn.ModuleDict(
        {name: nn.Linear(TEXT_CONFIG["hidden_size"], len(values) + 1) for name, values in ATTRIBUTES.items()}
    ).to(device)
    parameters = [*text.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.0)
    state = load_state(path, device)
    if state:
        text.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
    for step in steps_left(state, options.text_steps, optimizer, 1e-3):
        rng = batch_rng(options.seed, "text", step)
        requests = prompts_of([random_scene(rng) for _ in range(64)], rng)
        pooled = text(tokenize(tokenizer, [request.prompt for request in requests]).to(device)).pooler_output
        loss, right = torch.zeros((), device=device), 0.0
        for name, values in ATTRIBUTES.items():
            said = [getattr(request, name) for request in requests]
            target = torch.tensor([values.index(v) + 1 if v else 0 for v in said], device=device)
            scores = heads[name](pooled)
            loss = loss + nn.functional.cross_entropy(scores, target)
            right += float((scores.argmax(1) == target).float().mean()) / len(ATTRIBUTES)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == options.text_steps - 1:
            print(f"text {step} loss {float(loss):.4f} right {right:.4f}", flush=True)
        if step % 250 == 249 or step == options.text_steps - 1:
            save_state(
                path,
                model=text.state_dict(),
                heads=heads.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
    return text.eval().requires_grad_(False)


@torch.no_grad()
def latents_of(work: Path, vae: AutoencoderKL, options: argparse.Namespace) -> tuple[list[Scene], dict[str, Any]]:
    """The training set as latents, encoded once: mean and std (n, 4, 16, 16) in float16."""
    rng = batch_rng(options.seed, "unet", 2**31)
    scenes = [random_scene(rng) for _ in range(options.pictures)]
    path = work / "latents.pt"
    state = load_state(path, "cpu")
    if not state:
        means, stds = [], []
        for start in range(0, len(scenes), 64):
            images = pixels(scenes[start : start + 64], batch_rng(options.seed, "unet", 2**31 + 1 + start))
            with autocast(options.device):
                posterior = vae.encode(images.to(options.device, memory_format=torch.channels_last)).latent_dist
            means.append(posterior.mean.half().cpu())
            stds.append(posterior.std.half().cpu())
        state = {"mean": torch.cat(means), "std": torch.cat(stds)}
        state["scaling_factor"] = round(float(1 / state["mean"].float().std()), 5)
        save_state(path, **state)
        print(f"encoded {len(scenes)} pictures, scaling factor {state['scaling_factor']}", flush=True)
    return scenes, state


def train_unet(
    work: Path, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, options: argparse.Namespace
) -> tuple[UNet2DConditionModel, float]:
    """Stage 3: epsilon prediction with min-SNR weights (gamma 5, Hang et al. 2023), EMA, 10 % empty prompts."""
    torch.manual_seed(options.seed + 2)
    path, device = work / "unet.pt", options.device
    scenes, latents = latents_of(work, vae, options)
    scale = float(latents["scaling_factor"])
    unet = UNet2DConditionModel(**UNET_CONFIG).to(device)
    if device == "cpu":  # PyTorch's fused attention has a slow backward pass on CPUs: a step took 1.4 times as long
        unet.set_attn_processor(AttnProcessor())
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    state = load_state(path, device)
    if state:
        unet.load_state_dict(state["model"])
        average.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
    scheduler = DDPMScheduler(**{k: v for k, v in NOISE_CONFIG.items() if k != "steps_offset"})
    alphas = scheduler.alphas_cumprod.to(device)

    def loss_of(noisy: torch.Tensor, t: torch.Tensor, context: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            predicted = unet(noisy, t, context).sample.float()
        snr = alphas[t] / (1 - alphas[t])
        weighted: torch.Tensor = (predicted - noise).square().mean((1, 2, 3)) * snr.clamp(max=5.0) / snr
        return weighted.mean()

    step_loss: Callable[..., Any] = torch.compile(loss_of) if options.compile else loss_of
    started, running, first = time.time(), 0.0, int(state.get("step", 0))
    for step in steps_left(state, options.unet_steps, optimizer, options.unet_rate):
        rng = batch_rng(options.seed, "unet", step)
        torch.manual_seed(int(rng.integers(2**31)))
        chosen = rng.integers(len(scenes), size=options.unet_batch)
        mean, std = latents["mean"][chosen].float(), latents["std"][chosen].float()
        x0 = ((mean + std * torch.randn_like(mean)) * scale).to(device)
        requests = prompts_of([scenes[i] for i in chosen], rng)
        prompts = ["" if rng.random() < 0.1 else request.prompt for request in requests]
        with torch.no_grad(), autocast(device):
            context = text(tokenize(tokenizer, prompts).to(device)).last_hidden_state.float()
        # Half the timesteps lean to high noise, where background, place and size are decided.
        share = rng.random(len(chosen))
        share[::2] = np.sqrt(share[::2])
        t = torch.from_numpy((share * 1000).astype(np.int64)).to(device)
        noise = torch.randn_like(x0)
        noise += options.noise_offset * torch.randn(*noise.shape[:2], 1, 1, device=noise.device)
        loss = step_loss(scheduler.add_noise(x0, noise, t), t, context, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(0.9985, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        running = 0.98 * running + 0.02 * float(loss.detach())
        if step % 50 == 0 or step == options.unet_steps - 1:
            shown = running / (1 - 0.98 ** (step + 1 - first))
            print(f"unet {step} loss {shown:.4f}, {time.time() - started:.0f} s", flush=True)
        if step % 250 == 249 or step == options.unet_steps - 1:
            save_state(
                path,
                model=unet.state_dict(),
                ema=average.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
    return average.eval(), scale


def save_checkpoint(
    out: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    tokenizer_dir: Path,
    unet: UNet2DConditionModel,
    scaling_factor: float,
) -> None:
    """Stage 4: the diffusers folder, weights in float16 safetensors."""
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = StableDiffusionPipeline(
        vae=vae.to("cpu"),
        text_encoder=text.to("cpu"),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_dir),
        unet=unet.to("cpu"),
        scheduler=PNDMScheduler(
            **{k: v for k, v in NOISE_CONFIG.items() if k != "clip_sample"}, skip_prk_steps=True, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    scratch = out.with_name(out.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    pipeline.save_pretrained(scratch, safe_serialization=True)
    shutil.rmtree(scratch / "tokenizer")
    shutil.copytree(tokenizer_dir, scratch / "tokenizer")
    out.mkdir(parents=True, exist_ok=True)
    for item in scratch.iterdir():
        target = out / item.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(item, target)
    scratch.rmdir()
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(json.dumps({"saved": str(out), "megabytes": round(size / 1e6, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="training state, resumed from here")
    parser.add_argument("--out", type=Path, default=Path("build/shapes-checkpoint"), help="the finished checkpoint")
    parser.add_argument("--stop-after", choices=STAGES, default="save")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=10240, help="scenes encoded for the U-Net")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--vae-crop-steps", type=int, default=1750, help="of these, on 64x64 crops")
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--unet-batch", type=int, default=32)
    parser.add_argument("--unet-rate", type=float, default=8e-4)
    parser.add_argument(
        "--noise-offset",
        type=float,
        default=0.15,
        help="noise common to a whole channel: without it the last timestep still shows a picture's mean colour, "
        "and the U-Net reads the background there instead of in the prompt",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the training steps")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    tokenizer_dir = write_tokenizer(options.work / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_dir)
    vae = train_vae(options.work, options)
    if options.stop_after == "vae":
        return
    text = train_text(options.work, tokenizer, options)
    if options.stop_after == "text":
        return
    unet, scale = train_unet(options.work, vae, text, tokenizer, options)
    if options.stop_after == "save":
        save_checkpoint(options.out, vae, text, tokenizer_dir, unet, scale)


if __name__ == "__main__":
    main()
