"""How InvokeAI recognises the base model of a LoRA file, in our own words; see `invokeai`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Shape = tuple[int, ...]

KOHYA_TEXT = re.compile(
    r"lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w"
    r"|lora_te2_encoder_block_\d+_layer_\d+_(DenseReluDense|SelfAttention)_\w"
)
KOHYA_FLUX = re.compile(
    KOHYA_TEXT.pattern
    + r"|lora_unet_\w+_blocks_\d+_(img_attn|img_mlp|img_mod|txt_attn|txt_mlp|txt_mod|linear1|linear2|modulation)"
    r"|lora_unet_final_layer_(linear|linear1|linear2)"
)
ONETRAINER = re.compile(
    r"lora_transformer_(single_transformer_blocks|transformer_blocks)_\d+_\w+\."
)
PEFT = ("lora_A.weight", "lora_B.weight")
DOTTED_LORA = (*PEFT, "lora.down.weight", "lora.up.weight")
LOKR = tuple(f"lokr_{role}" for role in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2"))
LOHA = tuple(f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
BFL = ("diffusion_model.", "base_model.model.")


def _all(keys: Iterable[str], pattern: re.Pattern[str]) -> bool:
    return all(pattern.match(key) for key in keys)


def flux_format(keys: Mapping[str, Shape], metadata: bool = False) -> str:
    """The layout of a file for FLUX.1 or FLUX.2; empty if it is none.

    `metadata`: the file has some, not from ai-toolkit. It counts when a file is recognised, not when it is converted.
    """
    if _all(keys, KOHYA_FLUX):
        return "kohya"
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    omi = all(key.startswith("transformer.") and key.endswith(ends) for key in keys) and any(
        re.match(r"transformer\.(double|single)_blocks\.", key) for key in keys
    )
    if omi and any(re.search(r"\.qkv\.[012]\.|\.linear1\.0\.", key) for key in keys):
        return "onetrainer-bfl"
    if all(ONETRAINER.match(key) or KOHYA_TEXT.match(key) for key in keys):
        return "onetrainer"
    if all(key.endswith(DOTTED_LORA) for key in keys) and _diffusers_flux(keys):
        return "diffusers"
    if _control(keys):
        return "control"
    blocks = ("double_blocks.", "single_blocks.")
    toolkit = any(key.startswith(tuple(f"diffusion_model.{b}" for b in blocks)) for key in keys)
    if toolkit and not metadata and not any(key.endswith((*LOKR, *LOHA)) for key in keys):
        return "aitoolkit"
    if all(re.match(r"double_blocks\.\d+\.processor\.", key) for key in keys):
        return "xlabs"
    known = (*PEFT, *LOKR, *LOHA, "alpha", "dora_scale", "diff")
    if all(key.endswith(known) and key.startswith(BFL) for key in keys) and any(
        key.startswith(tuple(p + b for p in BFL for b in blocks)) for key in keys
    ):
        return "bfl"
    return ""


def _diffusers_flux(keys: Mapping[str, Shape]) -> bool:
    for prefix in ("transformer.", "base_model.model."):
        telling = (
            f"{prefix}single_transformer_blocks.0.attn.to_q",
            f"{prefix}transformer_blocks.0.attn.add_q_proj",
        )
        if all(f"{stem}.{end}" in keys for stem in telling for end in PEFT):
            return True
    two = any(re.search(r"to_qkv_mlp_proj|ff\.linear_in|ff_context\.linear_in", k) for k in keys)
    return two and any(
        re.match(r"(transformer\.|base_model\.model\.|)(single_transformer_blocks\..*to_qkv_mlp_proj|transformer_blocks\.)", k)
        for k in keys
    )  # fmt: skip


def _control(keys: Mapping[str, Shape]) -> bool:
    pattern = re.compile(r"(\w+\.)+(lora_A\.weight|lora_B\.weight|lora_B\.bias|scale)")
    down, up = keys.get("img_in.lora_A.weight"), keys.get("img_in.lora_B.weight")
    bias = keys.get("img_in.lora_B.bias")
    return (
        _all(keys, pattern)
        and down is not None
        and up is not None
        and bias is not None
        and (down[1], up[0], bias[0]) == (128, 3072, 3072)
    )


CONTEXT, VECTOR, WIDTH = (7680, 12288, 15360), (2560, 4096, 5120), 3072


def _inputs(keys: Mapping[str, Shape], stem: str) -> int | None:
    """The columns of a LoKr, told only where both factors are stored in the same way."""
    for one, two in (("w1", "w2"), ("w1_b", "w2_b")):
        if f"{stem}.lokr_{one}" in keys and f"{stem}.lokr_{two}" in keys:
            return keys[f"{stem}.lokr_{one}"][1] * keys[f"{stem}.lokr_{two}"][1]
    return None


def _outputs(keys: Mapping[str, Shape], stem: str) -> int | None:
    for one, two in (("w1", "w2"), ("w1_a", "w2_a")):
        if f"{stem}.lokr_{one}" in keys and f"{stem}.lokr_{two}" in keys:
            return keys[f"{stem}.lokr_{one}"][0] * keys[f"{stem}.lokr_{two}"][0]
    return None


def is_flux2(keys: Mapping[str, Shape]) -> bool:
    """Whether a FLUX file is for FLUX.2: by widths that only LoRA and LoKr tell."""
    for prefix in ("transformer.", "base_model.model.", ""):
        for stem, sizes in (
            ("context_embedder", CONTEXT),
            ("time_text_embed.text_embedder.linear_1", VECTOR),
        ):
            if (key := f"{prefix}{stem}.lora_A.weight") in keys:
                return keys[key][1] in sizes
        for stem in (
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "transformer_blocks.0.ff.linear_in",
        ):
            if f"{prefix}{stem}.lora_A.weight" in keys:
                return True
    return _flux2_by_width(keys, BFL, ".", "lora_A.weight", "lora_B.weight") or _flux2_by_width(
        keys, ("lora_unet_",), "_", "lora_down.weight", "lora_up.weight"
    )


def _flux2_by_width(
    keys: Mapping[str, Shape], prefixes: tuple[str, ...], joiner: str, down: str, up: str
) -> bool:
    width: int | None = None
    proj, mlp = f"{joiner}img_attn{joiner}proj.", f"{joiner}img_mlp{joiner}0."
    ours = [key for key in keys if key.startswith(prefixes)]
    for key in ours:
        stem, _, _ = key.rpartition(".")
        size = None
        if key.endswith(down):
            size = keys[key][1]
        elif key.endswith((".lokr_w1", ".lokr_w1_b")):
            size = _inputs(keys, stem)
        if size is None:
            continue
        # kohya's names must end there, the others only contain the words
        text = key.startswith(("lora_unet_txt_in.", "lora_unet_context_embedder."))
        vector = key.startswith("lora_unet_vector_in.")
        if joiner == ".":
            text, vector = "txt_in" in key, "vector_in" in key
        if text or vector:
            return size in (CONTEXT if text else VECTOR)
        if proj in key:
            width = size
            if width != WIDTH:
                return True
    if width == WIDTH:
        for key in ours:
            if mlp in key:
                stem, _, _ = key.rpartition(".")
                if key.endswith(up):
                    return keys[key][0] != 4 * WIDTH
                if key.endswith((".lokr_w1", ".lokr_w1_a")):
                    size = _outputs(keys, stem)
                    return size is not None and size != 4 * WIDTH
    return False


def token_width(keys: Mapping[str, Shape]) -> int | None:
    """The width that tells Stable Diffusion 1, 2 and XL apart, by the first key that tells one."""
    te1 = te2 = None
    for key, shape in keys.items():
        found = None
        if key.startswith("lora_unet_") and re.search(r"_attn2_to_[kv]\.", key):
            found = _second(keys, key, shape)
        elif key.startswith("lora_unet_") and "time_emb_proj.lora_down" in key:
            found = shape[1]
        elif key.startswith("lora_te") and "_self_attn_" in key:
            width = _second(keys, key, shape)
            if key.startswith("lora_te_"):
                found = width
            elif key.startswith("lora_te1_"):
                te1 = width
            elif key.startswith("lora_te2_"):
                te2 = width
        if te1 is not None and te2 is not None:
            found = te1 + te2
        if found is not None:
            return found
    return None


def _second(keys: Mapping[str, Shape], key: str, shape: Shape) -> int | None:
    stem, _, suffix = key.partition(".")
    if suffix in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff"):
        return shape[1]
    if "lokr_" in suffix:  # of factored LoKr it looks for keys without the dot
        whole = keys.get(f"{stem}.lokr_w1"), keys.get(f"{stem}.lokr_w2")
        return whole[0][1] * whole[1][1] if whole[0] and whole[1] else None
    if suffix == "weight" and "lora_unet_" not in stem:
        return shape[0]
    return None


DEEP = re.compile(
    r"lora_unet_((down_blocks|up_blocks)_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(input_blocks|output_blocks)_\d+_\d+|middle_block_\d+)_transformer_blocks_([2-9]|\d\d+)_"
)
LOOKS_LIKE_LORA = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_transformer_")
LORA_SUFFIX = (
    "to_k_lora.up.weight", "to_q_lora.down.weight", *PEFT, "lokr_w1", "lokr_w2", "hada_w1_a", "hada_w2_a",
)  # fmt: skip
COSMOS = r"blocks[._]\d+[._](cross_attn|self_attn|mlp|adaln_modulation)"
COSMOS_OWN = r"blocks[._]\d+[._](mlp[._]layer|adaln_modulation|(?:cross|self)_attn[._](?:[qkv]_proj|output_proj))"
COSMOS_STEM = (
    r"(lora_unet_(llm_adapter_)?|(diffusion_model|transformer|base_model\.model\.transformer)\.)"
)
ENDS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "dora_scale")
Z_IMAGE = (
    "diffusion_model.layers.", "diffusion_model.context_refiner.", "diffusion_model.noise_refiner.",
    "transformer.layers.", "base_model.model.transformer.layers.",
)  # fmt: skip
Z_KOHYA = r"lora_unet__(layers|context_refiner|noise_refiner)_(\d+)_(attention|feed_forward)_(to_k|to_q|to_v|w1|w2|w3)"
WAN = re.compile(
    r"lora_unet_blocks_\d+_(attn[12]_(to_[qkv]|to_out_0|norm_[qk])|(self_attn|cross_attn)_[qkvo](_|\.|$)|ffn_(\d+|net_\d+))"
    r"|(^|(diffusion_model|transformer|base_model\.model\.transformer)\.)blocks\.\d+\."
    r"(attn1\.|attn2\.|ffn\.net\.|(self_attn|cross_attn)\.[qkvo](\.|$)|ffn\.\d+\.)"
)
NOT_WAN = re.compile(
    r"blocks[._]\d+[._](mlp|adaln_modulation)|(self_attn|cross_attn)[._]([qkv]_proj|output_proj)"
    r"|(^|\.)transformer_blocks\.\d+\.|(^|\.|_)(double_blocks|single_blocks|single_transformer_blocks)[._]\d+"
    r"|diffusion_model\.layers\.\d+\."
)


def recognised(family: str, keys: Mapping[str, Shape]) -> bool:
    """Whether the file is recognised as one for this family."""
    some = lambda *ends: any(key.endswith(ends) for key in keys)
    starts = lambda *heads: any(key.startswith(heads) for key in keys)
    if family in ("flux", "flux2"):
        found = flux_format(keys, metadata=True)
        if found == "control":
            return family == "flux"
        return bool(found) and is_flux2(keys) == (family == "flux2")
    if family in ("sd1", "sd2", "sdxl"):
        if flux_format(keys) or not (starts(*LOOKS_LIKE_LORA) or some(*LORA_SUFFIX)):
            return False
        if any(re.search(COSMOS_STEM + COSMOS, key) for key in keys):
            return False
        width = token_width(keys)
        base = {768: "sd1", 1024: "sd2", 1280: "sdxl", 2048: "sdxl"}.get(width or 0)
        if base is None and any(DEEP.match(key) for key in keys):
            base = "sdxl"
        return base == family
    krea = any(re.search(r"text_fusion|txtfusion|time_mod_proj", key) for key in keys) or (
        any(".attn.wq." in key for key in keys) and any(".attn.gate." in key for key in keys)
    )
    if family == "z-image":
        return any(re.match(Z_KOHYA, key) for key in keys) or (starts(*Z_IMAGE) and some(*ENDS))
    if family == "qwen-image":
        flux = (
            "double_blocks.", "single_blocks.", "single_transformer_blocks.", "transformer.single_transformer_blocks.",
            "lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_unet_single_transformer_blocks_",
        )  # fmt: skip
        return (
            starts(
                "transformer_blocks.",
                "transformer.transformer_blocks.",
                "lora_unet_transformer_blocks_",
            )
            and some(*ENDS, "lokr_w1", "lokr_w2")
            and not starts("diffusion_model.layers.", *flux)
            and not krea
        )
    if family == "krea2":
        pairs = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
        return krea and any(some(one) and some(two) for one, two in pairs)
    if family == "anima":
        own = any(re.search(COSMOS_STEM + COSMOS_OWN, key) for key in keys)
        return own and some(*ENDS, ".lokr_w1", ".lokr_w2")
    if family == "wan":
        return (
            any(WAN.search(key) for key in keys)
            and some(*ENDS, ".lokr_w1", ".lokr_w2")
            and not any(NOT_WAN.search(key) for key in keys)
        )
    return False
