"""Against diffusers' encode_prompt on small random text encoders, and against torch for the web UI's emphasis."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.runtime.embedding_cache import EmbeddingCache
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.layer_norm import LayerNorm
from latentrt.runtime.specs import Array, ModelSpec, TensorSpec
from latentrt.runtime.text_encoding import (
    Embeddings,
    PromptEncoder,
    TextEncoder,
    apply_emphasis,
    zero_embeddings_like,
)
from latentrt.runtime.tokenizer import ClipTokenizer, load_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "shapes" / "tokenizer"
TOKENIZER = load_tokenizer(FOLDER)
TOKENIZER_2 = ClipTokenizer(TOKENIZER.tokenizer, TOKENIZER.bos, TOKENIZER.eos, pad=0)
LAYERS = 4
# Both sides are float32; the order of additions is not the same.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}


class TorchSession:
    """A transformers text encoder with the names of an exported graph. Counts its runs."""

    backend = "torch"

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.runs = model, 0
        first = "text_embeds" if hasattr(model, "text_projection") else "pooler_output"
        names = [first, "last_hidden_state", *(f"hidden_states.{n}" for n in range(LAYERS + 1))]
        self.spec = ModelSpec(
            name, (TensorSpec("input_ids", "int64", ("b", 77)),), tuple(TensorSpec(n, "float32", ()) for n in names)
        )

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        assert feeds["input_ids"].shape == (1, 77)
        self.runs += 1
        with torch.no_grad():
            out = self.model(torch.from_numpy(np.asarray(feeds["input_ids"])), output_hidden_states=True)
        named: dict[str, Any] = {spec.name: getattr(out, spec.name) for spec in self.spec.outputs[:2]}
        named |= {f"hidden_states.{n}": state for n, state in enumerate(out.hidden_states)}
        return {name: value.numpy() for name, value in named.items()}

    def close(self) -> None:
        """Nothing to give back."""


def _model(kind: str, width: int, seed: int) -> Any:
    import torch
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        projection_dim=24,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():  # trained gains and biases are not 1 and 0
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        "text_encoder": _model("CLIPTextModel", 32, 0),
        "text_encoder_2": _model("CLIPTextModelWithProjection", 48, 1),
    }


def encoder_of(models: dict[str, Any], name: str) -> TextEncoder:
    return TextEncoder(TorchSession(models[name], name), TOKENIZER if name == "text_encoder" else TOKENIZER_2)


@pytest.fixture
def sd(models: dict[str, Any]) -> PromptEncoder:
    return PromptEncoder([encoder_of(models, "text_encoder")])


@pytest.fixture
def sdxl(models: dict[str, Any]) -> PromptEncoder:
    return PromptEncoder([encoder_of(models, name) for name in models])


@pytest.fixture(scope="module")
def references(models: dict[str, Any]) -> dict[str, Any]:
    """diffusers' pipelines, with nothing but their text encoders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        from transformers import CLIPTokenizer

        def tokenizer(**options: Any) -> Any:
            return CLIPTokenizer.from_pretrained(FOLDER, model_max_length=77, **options)

        # diffusers 0.42 looks for the final LayerNorm where transformers 4 had it.
        model = models["text_encoder"]
        if not hasattr(model, "text_model"):
            model.text_model = SimpleNamespace(final_layer_norm=model.final_layer_norm)
        scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
        nothing = {"vae": None, "unet": None, "scheduler": scheduler, "feature_extractor": None}
        sd = diffusers.StableDiffusionPipeline(
            **nothing, text_encoder=model, tokenizer=tokenizer(), safety_checker=None, requires_safety_checker=False
        )
        nothing.pop("feature_extractor")
        second = {"text_encoder_2": models["text_encoder_2"], "tokenizer_2": tokenizer(pad_token="!")}
        xl = diffusers.StableDiffusionXLPipeline(
            **nothing, **second, text_encoder=model, tokenizer=tokenizer(), add_watermarker=False
        )
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline(
            **nothing, **second, text_encoder=None, tokenizer=None, requires_aesthetics_score=True
        )
    return {"sd": sd, "sdxl": xl, "refiner": refiner}


def _encoded(pipeline: Any, prompt: str, **options: Any) -> list[Any]:
    import torch

    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **options
        )
    return [None if value is None else value[0].numpy() for value in found]


PROMPT = "a small red circle, on a blue background"


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2, LAYERS])
def test_stable_diffusion(clip_skip: int | None, sd: PromptEncoder, references: dict[str, Any]) -> None:
    wanted, _ = _encoded(references["sd"], PROMPT, clip_skip=clip_skip)
    ours = sd(PROMPT, clip_skip=clip_skip)
    assert ours.pooled is None
    assert ours.hidden.dtype == np.float32
    np.testing.assert_allclose(ours.hidden, wanted, **CLOSE)


@pytest.mark.parametrize("clip_skip", [None, 1, LAYERS - 1])
@pytest.mark.parametrize("text_2", [None, "something else"])
def test_sdxl(clip_skip: int | None, text_2: str | None, sdxl: PromptEncoder, references: dict[str, Any]) -> None:
    wanted, _, pooled, _ = _encoded(references["sdxl"], PROMPT, prompt_2=text_2, clip_skip=clip_skip)
    ours = sdxl(PROMPT, text_2=text_2, clip_skip=clip_skip)
    assert ours.hidden.shape == (77, 80)
    np.testing.assert_allclose(ours.hidden, wanted, **CLOSE)
    assert ours.pooled is not None
    np.testing.assert_allclose(ours.pooled, pooled, **CLOSE)


def test_the_negative_prompt_of_sdxl(sdxl: PromptEncoder, references: dict[str, Any]) -> None:
    _, negative, _, pooled = _encoded(references["sdxl"], PROMPT, negative_prompt="ugly")
    ours = sdxl("ugly")
    assert ours.pooled is not None
    np.testing.assert_allclose(ours.hidden, negative, **CLOSE)
    np.testing.assert_allclose(ours.pooled, pooled, **CLOSE)
    _, negative, _, pooled = _encoded(references["sdxl"], PROMPT)
    zeros = zero_embeddings_like(sdxl(PROMPT))
    np.testing.assert_array_equal(zeros.hidden, negative)
    np.testing.assert_array_equal(zeros.pooled, pooled)


def test_the_refiner(models: dict[str, Any], references: dict[str, Any]) -> None:
    wanted, _, pooled, _ = _encoded(references["refiner"], PROMPT)
    ours = PromptEncoder([encoder_of(models, "text_encoder_2")])(PROMPT)
    np.testing.assert_allclose(ours.hidden, wanted, **CLOSE)
    assert ours.pooled is not None
    np.testing.assert_allclose(ours.pooled, pooled, **CLOSE)


def test_the_final_layer_norm_is_recovered(models: dict[str, Any], sd: PromptEncoder) -> None:
    encoder = sd.encoders[0]
    real = models["text_encoder"].final_layer_norm
    np.testing.assert_allclose(encoder.final_norm.gain, real.weight.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(encoder.final_norm.bias, real.bias.detach().numpy(), atol=1e-6)
    runs = encoder.session.runs  # type: ignore[attr-defined]
    assert encoder.final_norm.epsilon == 1e-5
    assert encoder.session.runs == runs  # type: ignore[attr-defined]


def test_a_channel_without_spread_has_no_gain() -> None:
    norm = LayerNorm.fit(np.ones((5, 3), np.float32), np.full((5, 3), 2, np.float32), epsilon=1e-5)
    np.testing.assert_array_equal(norm(np.ones((5, 3), np.float32)), np.full((5, 3), 2, np.float32))


@pytest.mark.parametrize("emphasis", ["original", "no_norm"])
def test_emphasis_is_the_web_uis(emphasis: Any, sd: PromptEncoder) -> None:
    """Multiply, then bring the chunk's mean back: two lines in torch."""
    import torch

    ours = PromptEncoder(sd.encoders, emphasis=emphasis)("a (red:1.5) [circle]").hidden
    z = torch.from_numpy(sd("a red circle").hidden.copy())
    weights = torch.ones(77, 1)
    weights[2], weights[3] = 1.5, 1 / 1.1
    weighted = z * weights
    wanted = weighted * (z.mean() / weighted.mean()) if emphasis == "original" else weighted
    np.testing.assert_allclose(ours, wanted.numpy(), **CLOSE)
    assert np.abs(ours - z.numpy()).max() > 0.1


def test_each_chunk_and_each_encoder_keeps_its_own_mean(sdxl: PromptEncoder) -> None:
    plain, weighted = sdxl("red BREAK blue"), sdxl("(red:1.5) BREAK (blue:0.5)")
    for rows in (slice(0, 77), slice(77, 154)):
        for columns in (slice(0, 32), slice(32, 80)):
            assert weighted.hidden[rows, columns].mean() == pytest.approx(plain.hidden[rows, columns].mean(), rel=1e-4)
    np.testing.assert_array_equal(weighted.pooled, plain.pooled)  # the web UI weights no pooled embedding


@pytest.mark.parametrize("emphasis", ["original", "no_norm", "ignore"])
def test_weights_of_one_change_no_bit(emphasis: Any, sd: PromptEncoder) -> None:
    encoder = PromptEncoder(sd.encoders, emphasis=emphasis)
    np.testing.assert_array_equal(encoder("a (red:1) ([circle]:1.1)").hidden, sd("a red circle").hidden)
    hidden, ones = np.ones((3, 2), np.float32), np.ones(3, np.float32)
    assert apply_emphasis(hidden, ones, emphasis) is hidden


def test_emphasis_ignored_and_off(sd: PromptEncoder, references: dict[str, Any]) -> None:
    ignoring = PromptEncoder(sd.encoders, emphasis="ignore")
    np.testing.assert_array_equal(ignoring("a (red:1.5) circle").hidden, sd("a red circle").hidden)
    literal = PromptEncoder(sd.encoders, emphasis="none")
    text = "a (red:1.5) [circle] BREAK"
    np.testing.assert_allclose(literal(text).hidden, _encoded(references["sd"], text)[0], **CLOSE)
    assert literal.chunk_count(text) == 1


def test_long_prompts_are_their_chunks(sdxl: PromptEncoder) -> None:
    long = sdxl("red " * 75 + "blue")
    first, second = sdxl("red " * 75), sdxl("blue")
    np.testing.assert_array_equal(long.hidden, np.concatenate([first.hidden, second.hidden]))
    np.testing.assert_array_equal(long.pooled, first.pooled)
    assert sdxl.chunk_count("red " * 75 + "blue") == 2
    assert sdxl.chunk_count("red", text_2="red " * 160) == 3


def test_padding_is_empty_prompts(sdxl: PromptEncoder) -> None:
    padded, empty = sdxl("red", chunks=3), sdxl("")
    np.testing.assert_array_equal(padded.hidden, np.concatenate([sdxl("red").hidden, empty.hidden, empty.hidden]))
    np.testing.assert_array_equal(padded.pooled, sdxl("red").pooled)
    skipped, empty_skipped = sdxl("red", chunks=2, clip_skip=1), sdxl("", clip_skip=1)
    np.testing.assert_array_equal(skipped.hidden[77:], empty_skipped.hidden)
    both = sdxl("red", text_2="red BREAK blue")
    np.testing.assert_array_equal(both.hidden[77:, :32], empty.hidden[:, :32])
    with pytest.raises(UsageError, match="at least 2"):
        sdxl("red BREAK blue", chunks=1)


def test_what_was_encoded_is_kept(sd: PromptEncoder) -> None:
    session: Any = sd.encoders[0].session
    first = sd(PROMPT)
    assert sd(PROMPT) is first
    assert session.runs == 1
    with pytest.raises(ValueError, match="read-only"):
        first.hidden[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        sd(PROMPT, chunks=2).hidden[0, 0] = 1
    assert sd.cache.info.hits == 2


def test_a_shared_cache_keeps_everything_apart(models: dict[str, Any]) -> None:
    cache = EmbeddingCache[Embeddings]()
    one, other = (PromptEncoder([encoder_of(models, name)], cache=cache) for name in models)
    xl = PromptEncoder([encoder_of(models, name) for name in models], cache=cache)
    plain = PromptEncoder(one.encoders, cache=cache, emphasis="no_norm")
    text = "a (red:1.5) circle"
    calls = [one(text), one(text, clip_skip=1), other(text), plain(text), xl(text), xl(text, text_2="x"), xl("x")]
    assert cache.info.misses == len(calls) == cache.info.entries
    again = [one(text), one(text, clip_skip=1), other(text), plain(text), xl(text), xl(text, text_2="x"), xl("x")]
    assert all(a is b for a, b in zip(calls, again, strict=True))


def test_eight_threads_get_what_one_gets(models: dict[str, Any]) -> None:
    texts = [f"a {word} circle" for word in ("red", "blue", "green", "small")] * 8
    alone, shared = (PromptEncoder([encoder_of(models, "text_encoder")]) for _ in range(2))
    with ThreadPoolExecutor(8) as pool:
        for text, found in zip(texts, pool.map(lambda t: shared(t, clip_skip=1), texts), strict=True):
            np.testing.assert_array_equal(found.hidden, alone(text, clip_skip=1).hidden)


@pytest.mark.parametrize("clip_skip", [-1, True, 1.0, "1", LAYERS + 1])
def test_clip_skip_out_of_range(clip_skip: Any, sd: PromptEncoder) -> None:
    with pytest.raises(UsageError, match="clip_skip"):
        sd("red", clip_skip=clip_skip)


def test_clip_skip_of_sdxl_starts_one_layer_earlier(sdxl: PromptEncoder) -> None:
    with pytest.raises(UsageError, match=f"0 to {LAYERS - 1}"):
        sdxl("red", clip_skip=LAYERS)


class _Fixed:
    """A session that gives the same values whatever it is fed."""

    backend = "test"

    def __init__(self, **outputs: Array) -> None:
        self.outputs = outputs
        self.spec = ModelSpec("text_encoder", (), tuple(TensorSpec(n, "float32", v.shape) for n, v in outputs.items()))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return self.outputs

    def close(self) -> None:
        """Nothing to give back."""


def test_a_graph_without_hidden_states() -> None:
    encoder = PromptEncoder([TextEncoder(_Fixed(last_hidden_state=np.ones((1, 77, 4), np.float16)), TOKENIZER)])
    assert encoder("red").hidden.dtype == np.float32
    with pytest.raises(UsageError, match="Export the checkpoint again"):
        encoder("red", clip_skip=1)


def test_nan_names_its_source() -> None:
    broken = TextEncoder(_Fixed(last_hidden_state=np.full((1, 77, 4), np.nan, np.float32)), TOKENIZER)
    with pytest.raises(BackendError, match="text_encoder: expected finite"):
        PromptEncoder([broken])("red")
    fine = TextEncoder(_Fixed(last_hidden_state=np.ones((1, 77, 4), np.float32)), TOKENIZER)
    with pytest.raises(UsageError, match="weights"):
        PromptEncoder([fine])(f"(red:{'9' * 300})")


def test_other_arguments_out_of_range(sd: PromptEncoder) -> None:
    with pytest.raises(UsageError, match="one or two"):
        PromptEncoder([])
    with pytest.raises(UsageError, match="original, no_norm"):
        PromptEncoder(sd.encoders, emphasis="loud")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hidden", "pooled", "name"),
    [
        (np.zeros((1, 77, 4)), None, "hidden"),
        (np.zeros(77), None, "hidden"),
        (np.zeros((0, 4)), None, "hidden"),
        (np.full((77, 4), np.nan), None, "hidden"),
        (np.full((77, 4), 1e300), None, "hidden"),
        (np.full((77, 4), "x"), None, "hidden"),
        (np.zeros((77, 4)), np.zeros((1, 4)), "pooled"),
    ],
)
def test_embeddings_of_a_wrong_shape(hidden: Any, pooled: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"embeddings.{name}: expected"):
        Embeddings(hidden, pooled)


def test_embeddings_become_float32() -> None:
    made = Embeddings(np.zeros((77, 4), np.float64), np.zeros(3, np.float16))
    assert made.hidden.dtype == np.float32
    assert made.pooled is not None
    assert made.pooled.dtype == np.float32
    assert made.nbytes == 77 * 16 + 12


def test_the_shapes_bundle(shapes_bundle: Path, shapes_checkpoint: Path) -> None:
    """The real encoder's LayerNorm out of its exported graphs: exact in fp32, to fp16's rounding in fp16."""
    from safetensors.numpy import load_file

    from latentrt.runtime.session import OnnxSession

    weights = load_file(shapes_checkpoint / "text_encoder" / "model.safetensors")
    gain, bias = (
        next(v.astype(np.float64) for k, v in weights.items() if k.endswith(f"final_layer_norm.{kind}"))
        for kind in ("weight", "bias")
    )
    for file, bound in (("model.onnx", 1e-6), ("model.fp16.onnx", 1e-3)):
        norm = TextEncoder(OnnxSession(shapes_bundle / "text_encoder" / file), TOKENIZER).final_norm
        assert np.abs(norm.gain - gain).max() <= bound
        assert np.abs(norm.bias - bias).max() <= bound
