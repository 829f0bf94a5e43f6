"""What the keys of LoRA files mean: every trainer has its own names for one module of a network.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight              kohya (sd-scripts), LyCORIS
    lora_unet_input_blocks_1_1_proj_in.lora_down.weight                        the same on the original U-Net (SDXL)
    lora_te_…, lora_te1_…, lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha  its text encoders
    unet.….attn1.processor.to_q_lora.down.weight, ….to_out_lora.up.weight      diffusers before 0.17
    unet.….attn1.to_q.lora.down.weight, ….q_proj.lora_linear_layer.up.weight   diffusers before 0.22
    unet.….attn1.to_q.lora_A.weight, unet.base_model.model.….lora_B.weight     peft, and diffusers since
    base_model.model.….lora_A.default.weight, ….attn1.to_q.lora_A.weight       peft, one network without its name

Kohya's names have underscores for dots, which no rule can undo. So modules are compared in that form, and a network
offers all the names that its modules may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
# The end of a key and what the tensor is; `bias` where it changes the module's bias.
_ROLES = tuple(
    (re.compile(pattern + r"$"), role)
    for pattern, role in (
        (r"(\.lora_down|\.lora_A(\.\w+)?|(_lora|\.lora|\.lora_linear_layer)\.down)\.weight", "down"),
        (r"(\.lora_up|\.lora_B(\.\w+)?|(_lora|\.lora|\.lora_linear_layer)\.up)\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"(_lora|\.lora|\.lora_linear_layer)?\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.lora_magnitude_vector(\.\w+){0,2}", "magnitude"),
        *((rf"\.{name}", name) for half in "12" for name in (f"hada_w{half}_a", f"hada_w{half}_b", f"hada_t{half}")),
        *((rf"\.{name}", name) for half in "12" for name in (f"lokr_w{half}", f"lokr_w{half}_a", f"lokr_w{half}_b")),
        (r"\.lokr_t2", "lokr_t2"),
        (r"\.(diff|w_norm)", "diff"),
        (r"\.(diff_b|b_norm)", "bias"),
    )
)
# Methods that change weights in another way, by what only their keys have.
_OTHER_METHODS = {
    r"\.(oft_|boft_)": "OFT",
    r"\.on_input$|\.ia3_l": "IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.vera_lambda": "VeRA",
    r"\.lora_B(\.\w+)?\.bias$": "LoRA with biases",
    r"(^|\.)(bundle_emb|string_to_param|emb_params|clip_[lg])": "textual inversion",
}
_OLD_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Place:
    """What one tensor of a file is.

    Attributes:
        component: unet, text_encoder or text_encoder_2.
        module: of the network, in the file's naming, with underscores for dots.
        tensor: the module's `weight` or `bias`, which it changes.
        role: down, up, mid, alpha, magnitude (peft's), diff, or the name that LyCORIS has for it.
        path: the module with its dots, where the file has them.
    """

    component: str
    module: str
    tensor: str
    role: str
    path: str


def place_of(key: str) -> Place | None:
    """What a key says; None if it is of no known form."""
    found = next(((match, role) for pattern, role in _ROLES if (match := pattern.search(key))), None)
    if found is None:
        return None
    match, role = found
    name = key[: match.start()]
    prefix = next((prefix for prefix in _COMPONENTS if name.startswith(prefix)), "")
    path = name.removeprefix(prefix).removeprefix("base_model.model.").replace(".processor", "")
    if not path:
        return None
    bare = "text_encoder" if path.startswith(("text_model.", "encoder.layers.")) else "unet"
    component = _COMPONENTS.get(prefix, bare)
    if match[0].startswith("_lora"):
        path = _modern_attention(path, component)
    tensor, role = ("bias", "diff") if role == "bias" else ("weight", role)
    return Place(component, flat(path), tensor, role, path)


def _modern_attention(path: str, component: str) -> str:
    """A projection as diffusers' old attention processors name it, by the name of its module."""
    stem, dot, projection = path.rpartition(".")
    if component != "unet":
        return stem + dot + _OLD_ATTENTION.get(projection, projection)
    return path + ".0" if projection == "to_out" else path


def flat(path: str) -> str:
    """A module's name for comparing: underscores for dots, without the wrapper that transformers 4 has."""
    return path.replace(".", "_").removeprefix("text_model_")


def other_method(keys: Iterable[str]) -> str | None:
    """The method that keys of no known form belong to, where they tell."""
    keys = tuple(keys)
    return next(
        (name for pattern, name in _OTHER_METHODS.items() if any(re.search(pattern, key) for key in keys)), None
    )
