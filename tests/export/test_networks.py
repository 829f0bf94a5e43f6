"""Networks run with their weights in memory or layer by layer, held to diffusers' and transformers' own loading."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from families import Sources
from safetensors.torch import load_file, save_file
from torch import nn

from latentrt.export import networks as networks_module
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.checkpoint_parts import Part
from latentrt.export.networks import Network, libraries_quiet, open_network, weights_at_hand
from latentrt.export.reference_pipeline import reference_pipeline
from latentrt.export.reference_run import QUICK, sample_and_record
from latentrt.export.safety_checker import SafetyChecker
from latentrt.export.weights import Values, Weight
from latentrt.runtime.errors import ArtifactError, ConfigError

CLASSES: dict[str, Any] = {
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.ControlNetModel,
    "taesd": diffusers.AutoencoderTiny,
    "safety_checker": StableDiffusionSafetyChecker,
}
# A checkpoint that has the part.
FAMILIES = {**dict.fromkeys(CLASSES, "sdxl_control"), "safety_checker": "sd15_checked"}

Outputs = list[torch.Tensor]
Sourced = Callable[[str], Sources]


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@torch.no_grad()
def answers(name: str, module: Any) -> Outputs:
    """What a network makes of some inputs, through every way in that an export takes."""
    if name.startswith("text_encoder"):
        ids = torch.arange(2 * 77).reshape(2, 77)
        return list(module(ids, output_hidden_states=True).to_tuple()[:2])
    if name == "vae":
        gaussian = module.encode(noise(1, 3, 64, 48)).latent_dist
        return [gaussian.mean, gaussian.logvar, module.decode(noise(1, 4, 5, 7)).sample]
    if name == "taesd":
        return [module.decode(noise(1, 4, 5, 7)).sample]
    if name == "safety_checker":
        return list(SafetyChecker(module)(noise(2, 3, 224, 224)))
    added = {"text_embeds": noise(2, 32), "time_ids": torch.full((2, 6), 64.0)}
    inputs = (noise(2, 4, 8, 6), torch.tensor(321.0), noise(2, 77, 64))
    if name == "controlnet":
        down, middle = module(
            *inputs, controlnet_cond=torch.ones(2, 3, 64, 48), added_cond_kwargs=added, return_dict=False
        )
        return [*down, middle]
    return [module(*inputs, added_cond_kwargs=added).sample]


def part_of(name: str, family_sources: Sourced) -> Part:
    sources = family_sources(FAMILIES[name])
    return open_checkpoint(sources.path, controlnets=sources.controlnets, taesd=sources.taesd).parts[name]


@pytest.fixture(params=["held", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to have weights at hand, whatever their size."""
    if request.param == "streamed":
        monkeypatch.setattr(networks_module, "RESIDENT_BYTES", 0)
    return str(request.param)


def assert_at_rest(network: Network) -> None:
    """No weight in memory, and no hook left but those that transformers adds to its own layers for good."""
    assert {tensor.device.type for tensor in network.module.state_dict().values()} == {"meta"}
    assert not hasattr(network.module, "_hf_hook")
    for module in network.module.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        assert {hook.__module__.split(".")[0] for hook in hooks} <= {"transformers"}
        assert not module._forward_hooks_always_called


@pytest.mark.parametrize("name", CLASSES)
def test_a_network_answers_as_the_library_loads_it(name: str, way: str, family_sources: Sourced) -> None:
    part = part_of(name, family_sources)
    with libraries_quiet():
        wanted = answers(name, CLASSES[name].from_pretrained(part.origin).eval())
    network = open_network(part)
    assert_at_rest(network)
    with weights_at_hand(network):
        found = answers(name, network.module)
    assert_at_rest(network)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.abs().max() > 1e-3
        assert torch.equal(ours, theirs)


def test_a_network_runs_again_after_it_was_put_away(way: str, tiny_networks: dict[str, Network]) -> None:
    found = []
    for _ in range(2):
        with weights_at_hand(*tiny_networks.values()):
            found.append(answers("vae", tiny_networks["vae"].module))
        for network in tiny_networks.values():
            assert_at_rest(network)
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.parametrize("name", CLASSES)
def test_a_module_keeps_its_buffers_and_takes_no_gradients(name: str, family_sources: Sourced) -> None:
    network = open_network(part_of(name, family_sources))
    assert not any(module.training for module in network.module.modules())
    assert not any(parameter.requires_grad for parameter in network.module.parameters())
    assert all(buffer.device.type == "cpu" for buffer in network.module.buffers())


class Counted:
    """Weights of a chain of linear layers that know how many bytes of them are in memory."""

    def __init__(self, layers: int, width: int) -> None:
        with torch.device("meta"):
            self.module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).requires_grad_(False)
        self.live = self.peak = self.reads = 0

    def network(self) -> Network:
        weights = {name: self._weight(tuple(t.shape)) for name, t in self.module.state_dict().items()}
        return Network(self.module, weights)

    def _weight(self, shape: tuple[int, ...]) -> Weight:
        def read() -> Values:
            values = np.full(shape, 1 / shape[-1], np.float32)
            self.live += values.nbytes
            self.peak, self.reads = max(self.peak, self.live), self.reads + 1
            weakref.finalize(values, self._gone, values.nbytes)
            return values

        return Weight(shape, np.dtype(np.float32), read)

    def _gone(self, size: int) -> None:
        self.live -= size


def test_a_network_larger_than_the_bound_is_in_memory_a_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, width = 12, 64
    layer = 4 * width * (width + 1)
    monkeypatch.setattr(networks_module, "RESIDENT_BYTES", layers * layer - 1)
    counted = Counted(layers, width)
    network = counted.network()
    with weights_at_hand(network):
        assert counted.live == 0
        network.module(torch.ones(1, width))
        assert counted.live == 0
    assert counted.peak == layer
    assert counted.reads == 2 * layers


def test_a_network_up_to_the_bound_is_read_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, width = 12, 64
    size = layers * 4 * width * (width + 1)
    monkeypatch.setattr(networks_module, "RESIDENT_BYTES", size)
    counted = Counted(layers, width)
    network = counted.network()
    with weights_at_hand(network):
        for _ in range(3):
            network.module(torch.ones(1, width))
        assert counted.live == size
    gc.collect()
    assert (counted.live, counted.reads) == (0, 2 * layers)


def test_the_bound_counts_weights_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision files take twice their size in float32."""
    monkeypatch.setattr(networks_module, "RESIDENT_BYTES", 4 * 2 * 8 - 1)
    reads: list[str] = []

    def read() -> Values:
        reads.append("weight")
        return np.ones((2, 8), np.float16)

    with torch.device("meta"):
        module = nn.Linear(8, 2, bias=False).requires_grad_(False)
    with weights_at_hand(Network(module, {"weight": Weight((2, 8), np.dtype(np.float16), read)})):
        assert reads == []
        assert module(torch.ones(8)).tolist() == [8, 8]


@pytest.mark.parametrize("where", ["between layers", "in a layer", "in a weight"])
def test_an_error_inside_leaves_nothing_behind(
    where: str, way: str, tiny_networks: dict[str, Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_networks["unet"]
    inputs: Any = (torch.zeros(1, 4, 8, 8), torch.tensor(1.0), torch.zeros(1, 77, 32))
    error: type[Exception] = RuntimeError
    if where == "in a layer":
        inputs = (torch.zeros(1, 5, 8, 8), *inputs[1:])
    elif where == "in a weight":
        error, last = ArtifactError, network.weights["conv_out.weight"]

        def read() -> Values:
            raise ArtifactError("unet: expected numbers, got NaN.")

        network = Network(network.module, {**network.weights, "conv_out.weight": Weight(last.shape, last.dtype, read)})

    def use() -> None:
        with weights_at_hand(tiny_networks["vae"], network), torch.no_grad():
            if where == "between layers":
                raise RuntimeError
            network.module(*inputs)

    with pytest.raises(error):
        use()
    assert_at_rest(network)
    assert_at_rest(tiny_networks["vae"])


@pytest.mark.parametrize(
    ("name", "change"),
    [("unet", {"block_out_channels": 5}), ("text_encoder", {"hidden_size": "wide"}), ("vae", {"act_fn": "nothing"})],
)
def test_a_config_that_makes_no_network_is_a_config_error(
    name: str, change: dict[str, Any], family_sources: Sourced
) -> None:
    part = part_of(name, family_sources)
    broken = Part(name, part.origin, {**part.config, **change}, part.model_class, part.weights, part.files)
    with pytest.raises(ConfigError, match=f"{name}: expected the config of a {part.model_class}, got one that"):
        open_network(broken)


def test_a_nan_in_a_file_is_an_error_when_it_is_read(way: str, family_sources: Sourced, tmp_path: Path) -> None:
    part = part_of("taesd", family_sources)
    weights = load_file(part.origin / "diffusion_pytorch_model.safetensors")
    next(iter(weights.values())).view(-1)[3] = torch.nan
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(dict(part.config)))
    checkpoint = family_sources("sdxl_control").path
    network = open_network(open_checkpoint(checkpoint, taesd=tmp_path).parts["taesd"])

    def use() -> None:
        with weights_at_hand(network):
            answers("taesd", network.module)

    with pytest.raises(ArtifactError, match="NaN"):
        use()
    assert_at_rest(network)


@pytest.mark.parametrize(
    ("family", "drawn_by"),
    [
        ("sd15", "StableDiffusionPipeline"),
        ("sd15_inpaint", "StableDiffusionInpaintPipeline"),
        ("instruct_pix2pix", "StableDiffusionInstructPix2PixPipeline"),
        ("lcm", "StableDiffusionPipeline"),
        ("sd15_controlnet_pipeline", "StableDiffusionPipeline"),
        ("sdxl_base", "StableDiffusionXLPipeline"),
        ("sdxl_refiner", "StableDiffusionXLImg2ImgPipeline"),
        ("sdxl_inpaint", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_the_reference_draws_what_diffusers_own_pipeline_draws(
    family: str, drawn_by: str, way: str, family_sources: Sourced
) -> None:
    folder = family_sources(family).path
    checkpoint = open_checkpoint(folder)
    networks = {name: open_network(part) for name, part in checkpoint.parts.items()}
    ours = reference_pipeline(checkpoint, networks)
    assert type(ours).__name__ == drawn_by
    with libraries_quiet():
        theirs = getattr(diffusers, drawn_by).from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
    # PyTorch multiplies in another way, and rounds otherwise, where gradients may be asked for.
    theirs.unet.requires_grad_(False)
    with weights_at_hand(*networks.values()):
        calls, latents = sample_and_record(ours, seed=0, effort=QUICK)
    wanted_calls, wanted = sample_and_record(theirs, seed=0, effort=QUICK)
    assert torch.equal(latents, wanted)
    assert len(calls) == len(wanted_calls)
    for call, other in zip(calls, wanted_calls, strict=True):
        assert call.feeds.keys() == other.feeds.keys()
        assert all(torch.equal(call.feeds[name], other.feeds[name]) for name in call.feeds)
    config: Any = networks["unet"].module.config
    assert ("time_ids" in calls[0].feeds) == (config.addition_embed_type is not None)
    assert ("timestep_cond" in calls[0].feeds) == (config.time_cond_proj_dim is not None)
    for network in networks.values():
        assert_at_rest(network)


def test_a_scheduler_that_diffusers_does_not_know_is_named(family_sources: Sourced) -> None:
    checkpoint = open_checkpoint(family_sources("sd15").path)
    index = {**checkpoint.index, "scheduler": ["diffusers", "NobodysScheduler"]}
    with pytest.raises(ConfigError, match="expected a scheduler of diffusers, got NobodysScheduler"):
        reference_pipeline(type(checkpoint)(**{**vars(checkpoint), "index": index}), {})


@pytest.mark.parametrize("content", [b"{", b'{"model": 3}'])
def test_a_damaged_tokenizer_is_an_artifact_error(
    content: bytes, tiny_checkpoint: Path, tiny_networks: dict[str, Network]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    texts = {name: text for name, text in checkpoint.texts.items() if not name.startswith("tokenizer/")}
    broken = type(checkpoint)(**{**vars(checkpoint), "texts": {**texts, "tokenizer/tokenizer.json": content}})
    with pytest.raises(ArtifactError, match="tokenizer: expected a CLIP tokenizer"):
        reference_pipeline(broken, tiny_networks)
