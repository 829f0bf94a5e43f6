"""LoRAs of a bundle: added, listed, removed and folded into its graphs' weights, at any scale and in any precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_bundle import put_graph
from exports import contents
from lora_bundles import BLOCK, KEY, PROJECTION, QUERY, TEXT, WIDTH, make_bundle, network, unet_graph
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from latentrt.export.lora_bundle import add_lora, list_loras, lora_targets, remove_lora
from latentrt.export.qkv_packing import packed_name
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.lora_store import held_loras, open_loras
from latentrt.runtime.lora_weights import lora_weights
from latentrt.runtime.manifest import Manifest, load_manifest, problem_of, save_manifest
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array

RNG = np.random.default_rng(5)
FEEDS: dict[str, Array] = {
    "sample": RNG.standard_normal((1, 4, 8, 8)).astype(np.float32),
    "encoder_hidden_states": RNG.standard_normal((1, 7, TEXT)).astype(np.float32),
}
QUERY_KEY = f"lora_unet_{QUERY.removesuffix('.weight').replace('.', '_')}"
KEY_KEY = f"lora_unet_{KEY.removesuffix('.weight').replace('.', '_')}"
TEXT_KEY = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def factors(key: str, outputs: int, inputs: int, *, dtype: Any = np.float32, rank: int = 2) -> dict[str, Any]:
    return {
        f"{key}.lora_down.weight": RNG.standard_normal((rank, inputs)).astype(dtype),
        f"{key}.lora_up.weight": RNG.standard_normal((outputs, rank)).astype(dtype),
        f"{key}.alpha": np.array(rank / 2, dtype),
    }


def write(path: Path, *parts: dict[str, Any]) -> Path:
    save_file({key: value for part in parts for key, value in part.items()}, path)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.bundle")


@pytest.fixture
def style(tmp_path: Path) -> Path:
    parts = factors(QUERY_KEY, WIDTH, WIDTH), factors(KEY_KEY, WIDTH, TEXT), factors(TEXT_KEY, TEXT, WIDTH)
    return write(tmp_path / "style.safetensors", *parts)


def weights(bundle: Path, precision: str, component: str = "unet", **scales: float | None) -> dict[str, Array]:
    opened = open_bundle(bundle)
    return lora_weights(open_loras(opened, scales), opened.graph(component, precision), component)


def test_a_bundle_with_loras(bundle: Path, style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a user types, from the file to its removal; the bundle stays one that verify knows."""
    before = contents(bundle)
    assert main(["lora", "add", str(bundle), str(style), "--scale", "0.8", "--json"]) == 0
    added = json.loads(capsys.readouterr().out)["lora"]
    assert (added["name"], added["scale"], added["methods"]) == ("style", 0.8, ["LoRA"])
    assert added["changes"] == {"text_encoder": 1, "unet": 2}
    assert main(["lora", "add", str(bundle), str(style), "--name", "again"]) == 0
    capsys.readouterr()
    assert main(["lora", "list", str(bundle), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["loras"]
    assert listed[1] == added
    assert [lora["name"] for lora in listed] == ["again", "style"]
    assert main(["lora", "list", str(bundle)]) == 0
    manifest = load_manifest(bundle)
    assert all(problem_of(bundle, manifest, name) is None for name in manifest.files)
    # Changed in place, the file is refused.
    (bundle / "loras/style.safetensors").write_bytes((bundle / "loras/style.safetensors").read_bytes()[:-4] + bytes(4))
    with pytest.raises(ArtifactError, match=r"style\.safetensors.*SHA-256"):
        open_loras(open_bundle(bundle), ["style"])
    for name in ("style", "again"):
        assert main(["lora", "remove", str(bundle), name]) == 0
    assert contents(bundle) == before


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_weights_that_a_scale_makes(bundle: Path, style: Path, precision: str) -> None:
    """By hand: W + scale * alpha / rank * up @ down, transposed as a MatMul reads it, rounded once."""
    add_lora(bundle, style, scale=0.5)
    file, dtype = load_file(style), np.float16 if precision == "fp16" else np.float32
    for scale, used in ((None, 0.5), (-1.25, -1.25), (0.0, 0.0)):
        found = weights(bundle, precision, style=scale)
        assert found.keys() == {f"unet.{QUERY}", f"unet.{KEY}"}
        for name, key in ((QUERY, QUERY_KEY), (KEY, KEY_KEY)):
            change = np.float32(0.5) * (file[f"{key}.lora_up.weight"] @ file[f"{key}.lora_down.weight"])
            wanted = network(dtype)[name].astype(np.float32) + np.float32(used) * change
            np.testing.assert_array_equal(found[f"unet.{name}"], wanted.astype(dtype).T)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_b_base(bundle: Path, style: Path, tmp_path: Path, precision: str) -> None:
    """Outputs under A, B, both, and none again: bit for bit what a fresh session gives."""
    add_lora(bundle, style)
    add_lora(bundle, write(tmp_path / "b.safetensors", factors(QUERY_KEY, WIDTH, WIDTH)))
    path = open_bundle(bundle).graph("unet", precision)

    def draw(**scales: float | None) -> NDArray[np.float32]:
        changed = weights(bundle, precision, "unet", **scales)
        return np.asarray(OnnxSession(path, weights=changed)(FEEDS)["out_sample"], np.float32)

    base = np.asarray(OnnxSession(path)(FEEDS)["out_sample"], np.float32)
    results = [draw(style=0.7), draw(b=1.0), draw(style=0.7, b=-1.0)]
    np.testing.assert_array_equal(draw(), base)
    np.testing.assert_array_equal(draw(style=0.7), results[0])
    for one, other in ((base, results[0]), (base, results[1]), (results[0], results[2])):
        assert np.abs(one - other).max() > 0.1
    # What is taken out again comes back with the weights that the graph has.
    opened = open_bundle(bundle)
    loras = open_loras(opened, ["style"])
    restored = lora_weights((), path, "unet", also=loras)
    assert restored.keys() == {f"unet.{QUERY}", f"unet.{KEY}"}
    np.testing.assert_array_equal(OnnxSession(path, weights=restored)(FEEDS)["out_sample"], base)


def test_a_text_encoder(bundle: Path, style: Path) -> None:
    add_lora(bundle, style)
    found = weights(bundle, "fp32", "text_encoder", style=1.0)
    assert found.keys() == {f"text_encoder.{PROJECTION}"}
    feeds: dict[str, Array] = {"input_ids": np.arange(6)[None]}
    path = open_bundle(bundle).graph("text_encoder", "fp32")
    changed, base = (OnnxSession(path, weights=each)(feeds)["last_hidden_state"] for each in (found, {}))
    assert not np.allclose(changed, base, atol=0.1)


def test_a_lora_in_half_precision_stays_so(bundle: Path, tmp_path: Path) -> None:
    one = add_lora(bundle, write(tmp_path / "h.safetensors", factors(QUERY_KEY, WIDTH, WIDTH, dtype=np.float16)))
    two = add_lora(bundle, write(tmp_path / "f.safetensors", factors(QUERY_KEY, WIDTH, WIDTH)))
    assert two.size - one.size == 2 * 2 * 2 * WIDTH


def test_weights_for_engines(bundle: Path, style: Path, tmp_path: Path) -> None:
    """Those that trainers change; once the bundle holds LoRAs, exactly theirs."""
    opened = open_bundle(bundle)
    assert set(lora_targets(opened, "unet", "fp16")) == {f"unet.{QUERY}", f"unet.{KEY}"}
    assert lora_targets(opened, "text_encoder", "fp32") == (f"text_encoder.{PROJECTION}",)
    add_lora(bundle, write(tmp_path / "conv.safetensors", {"lora_unet_conv_in.diff_b": np.ones(WIDTH, np.float32)}))
    opened = open_bundle(bundle)
    assert lora_targets(opened, "unet", "fp16") == ("unet.conv_in.bias",)
    assert lora_targets(opened, "text_encoder", "fp16") == ()


def refused(bundle: Path, file: Path, message: str, error: type[Exception] = ArtifactError, **options: Any) -> None:
    """Adding a file fails with a message and leaves the bundle as it was."""
    before = contents(bundle)
    with pytest.raises(error, match=message):
        add_lora(bundle, file, **options)
    assert contents(bundle) == before


def test_files_that_are_refused(bundle: Path, style: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", factors(KEY_KEY, WIDTH, 768))
    refused(bundle, other, rf"attn2_to_k\S* for \(8, 768\) instead of \(8, {TEXT}\).*Stable Diffusion 1\.x")
    refused(bundle, write(tmp_path / "x.safetensors", factors("lora_unet_mid_block_x", 8, 8)), "lora_unet_mid_block_x")
    refused(bundle, write(tmp_path / "te2.safetensors", factors("lora_te2_x", 8, 8)), "lora_te2_x")
    nan = factors(QUERY_KEY, WIDTH, WIDTH)
    nan[f"{QUERY_KEY}.lora_up.weight"][0, 0] = np.nan
    refused(bundle, write(tmp_path / "nan.safetensors", nan), "expected finite values, got 1 NaN")
    (tmp_path / "cut.safetensors").write_bytes(style.read_bytes()[:-9])
    refused(bundle, tmp_path / "cut.safetensors", "as its header says")
    (tmp_path / "style.ckpt").write_bytes(b"PK\x03\x04" + bytes(40))
    refused(bundle, tmp_path / "style.ckpt", r"(?s)got a pickle.*Convert it.*torch\.load")
    refused(bundle, style, "finite scale", UsageError, scale=float("nan"))
    for name in ("../up", "a:b", "", " a", "a/b"):
        refused(bundle, style, "--name", UsageError, name=name)
    refused(tmp_path, style, "found none")


def test_a_name_that_is_taken(bundle: Path, style: Path) -> None:
    add_lora(bundle, style)
    refused(bundle, style, "'style'.*--force", UsageError, scale=0.5)
    add_lora(bundle, style, scale=0.5, force=True)
    assert [lora.scale for lora in list_loras(bundle)] == [0.5]


def test_names_that_are_not_held(bundle: Path, style: Path) -> None:
    add_lora(bundle, style)
    for call in (lambda: open_loras(open_bundle(bundle), ["stile"]), lambda: remove_lora(bundle, "stile")):
        with pytest.raises(UsageError, match=r"got 'stile', found style"):
            call()
    with pytest.raises(UsageError, match="style: expected a finite scale, got inf"):
        open_loras(open_bundle(bundle), {"style": float("inf")})
    assert held_loras(load_manifest(bundle)) == ["style"]


def test_a_weight_that_one_graph_has_not_by_itself(bundle: Path, style: Path) -> None:
    """Packed or folded into others, in any one of the graphs: refused by name before anything is written."""
    manifest = put_graph(bundle, "unet", "mixed", unet_graph(np.float16, without=QUERY), load_manifest(bundle))
    save_manifest(bundle, manifest)
    refused(bundle, style, rf"unet/model\.mixed\.onnx.*folded into others.*{BLOCK}\.attn1\.to_q\.weight")


def test_a_packed_graph(bundle: Path, style: Path) -> None:
    packed = packed_name([QUERY, f"{BLOCK}.attn1.to_k.weight", f"{BLOCK}.attn1.to_v.weight"])
    model = unet_graph(without=QUERY, instead=f"unet.{packed}")
    save_manifest(bundle, put_graph(bundle, "unet", "fp32", model, Manifest("", "", "")))
    refused(bundle, style, r"queries, keys and values in one: \S*attn1\.to_qkv\.weight.*--lora FILE")


def test_a_graph_that_was_exported_from_another_model_since(bundle: Path, style: Path) -> None:
    add_lora(bundle, style)
    manifest = put_graph(bundle, "unet", "fp32", unet_graph(without=KEY), load_manifest(bundle))
    save_manifest(bundle, manifest)
    with pytest.raises(
        ArtifactError, match=r"LoRA style was added for.*no weight \S*attn2\.to_k\.weight.*add it again"
    ):
        weights(bundle, "fp32", style=1.0)


def test_what_float16_does_not_hold(bundle: Path, style: Path) -> None:
    add_lora(bundle, style)
    assert np.isfinite(weights(bundle, "fp32", style=1e6)[f"unet.{QUERY}"]).all()
    with pytest.raises(UsageError, match="Lower the scale"):
        weights(bundle, "fp16", style=1e6)
