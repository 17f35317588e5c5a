"""Small models of Hugging Face's classes, inputs for them, and how far apart results are."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PADDING = (None, "left", "right")
TOLERANCE = 1e-4  # of the largest result; float32 with weights of unit gain stays below 1e-5

# What the configs call their sizes.
_SIZES = {
    32: "hidden_size d_model n_embd embed_dim dim hidden_dim emb_dim encoder_hidden_size "
    "word_embed_proj_dim embedding_size image_size projection_dim max_source_positions",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_decoder_layers num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers "
    "num_key_value_heads num_experts_per_tok num_experts_per_token index_n_heads "
    "linear_num_key_heads type_vocab_size eos_token_id sep_token_id",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads n_routed_experts "
    "decoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads num_experts "
    "num_local_experts sliding_window attention_window linear_num_value_heads mamba_n_heads",
    8: "head_dim d_kv kv_channels qk_rope_head_dim qk_nope_head_dim linear_key_head_dim "
    "linear_value_head_dim mamba_d_state hidden_size_per_layer_input laurel_rank rotary_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "v_head_dim index_head_dim qk_head_dim patch_size mamba_d_head num_mel_bins",
    48: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size",
    64: "max_position_embeddings n_positions max_target_positions",
    99: "vocab_size vocab_size_per_layer_input",
    3: "index_topk",
    1: "n_group topk_group n_shared_experts bos_token_id decoder_start_token_id cls_token_id",
    0: "pad_token_id",
}
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
# Other sizes for classes that these do not fit; None: the class's own.
VARIANTS: tuple[dict[str, int | None], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": None},
    {"head_dim": None},
    {"num_key_value_heads": None, "head_dim": None},
)


def small_config(kind: type, variant: dict[str, int | None] | None = None, depth: int = 0) -> Any:
    """A config of that class with every size that it knows made small."""
    stock = kind()
    sizes = SMALL | (variant or {})
    options = {
        name: size
        for name, size in sizes.items()
        if size is not None
        and isinstance(getattr(stock, name, None), int | float)
        and _settable(kind, name)
    }
    for name in getattr(stock, "sub_configs", None) or {}:
        inner = getattr(stock, name, None)
        if inner is not None and depth < 3:
            options[name] = small_config(type(inner), variant, depth + 1)
    types = getattr(stock, "layer_types", None)
    if types and _settable(kind, "layer_types"):
        attention_first = sorted(dict.fromkeys(types), key=lambda t: ("attention" not in t, t))
        options["layer_types"] = (attention_first * 2)[:2]
    if _settable(kind, "use_cache") and hasattr(stock, "use_cache"):
        options["use_cache"] = False
    config = kind(**options)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [1, 1, 2]  # half of a head of 8
    return config


def _settable(kind: type, name: str) -> bool:
    name = getattr(kind, "attribute_map", {}).get(name, name)
    return not isinstance(inspect.getattr_static(kind, name, None), property)


def build(kind: type[nn.Module], config: Any, implementation: str) -> nn.Module:
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    return kind(config).eval()


def draw_weights(model: nn.Module) -> None:
    """Weights of unit gain: the initial ones are so small that attention is uniform."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1 and p.is_floating_point():
            nn.init.normal_(p, std=min(p[0].numel() ** -0.5, 0.3), generator=generator)


def inputs(model: nn.Module, padded: str | None, text_alone: bool) -> dict[str, Tensor]:
    known = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 11, dtype=torch.int64)
    for row in (1, 2):
        if padded is not None:
            mask[row, slice(2 * row) if padded == "left" else slice(11 - 2 * row, None)] = 0
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else 32
    channels, bins = (getattr(vision, "num_channels", 3), getattr(model.config, "num_mel_bins", 16))
    given = {
        "input_ids": torch.randint(5, 90, (3, 11), generator=generator),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(5, 90, (3, 6), generator=generator),
    }
    others = {
        "pixel_values": torch.randn(3, channels, size, size, generator=generator),
        "input_values": torch.randn(3, 1600, generator=generator),
        "input_features": torch.randn(3, bins, 64, generator=generator),
    }
    if "input_ids" not in known:
        given = {}
    if not (text_alone and given):
        given |= others
    return {name: x for name, x in given.items() if name in known}


def run(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point results by name, without the padded positions."""
    torch.manual_seed(0)
    with torch.no_grad():
        results = dict(_tensors(model(**given)))
    mask = given.get("attention_mask")
    for name, x in results.items():
        if mask is not None and x.shape[:2] == mask.shape and "decoder" not in name:
            results[name] = x[mask.bool()]
    return results


def generate(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Two beams with a static cache; None where the model does not generate from such inputs."""
    if not model.can_generate() or not given.keys() <= {"input_ids", "attention_mask"}:
        return None
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": True, "use_cache": True}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        out = model.generate(**given, **options)
    return {"tokens": out.sequences.float(), "scores": out.sequences_scores}


def _tensors(x: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor) and x.is_floating_point():
        yield name, x
    elif isinstance(x, dict | list | tuple):
        pairs = x.items() if isinstance(x, dict) else enumerate(x)
        for key, inner in pairs:
            yield from _tensors(inner, f"{name}.{key}")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest, as a fraction of the largest result; inf where NaNs or shapes differ."""
    worst = 0.0
    for name, x in a.items():
        y = b.get(name)
        if y is None or x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()):
            return float("inf")
        finite = x.isfinite() & y.isfinite()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        if finite.any():
            scale = max(1.0, float(x[finite].abs().max()))
            worst = max(worst, float((x[finite] - y[finite]).abs().max()) / scale)
    return worst
