"""Hugging Face models of a few thousand parameters, with attention that is not uniform."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = {f"{kind}_token_id": i for i, kind in enumerate(("pad", "bos", "eos", "cls", "sep"))}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 99, "hidden_size": 32, **HEADS}
LLAMA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 4}
STACKS = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48}
BART = {**STACKS, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, **HEADS}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
LATENT |= {"topk_group": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16}
LATENT |= {**TEXT, "intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 8}
SPARSE = {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 16}
WAV = {**TEXT, "intermediate_size": 48, "conv_dim": (16, 16), "conv_stride": (5, 4)}
WAV |= {"conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4}
WAV |= {"num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}


def build(name: str, options: dict[str, Any], implementation: str = "sdpa") -> nn.Module:
    """The model class of that name, its weights drawn so that scores differ by whole units."""
    torch.manual_seed(0)
    config = getattr(transformers, name).config_class(**copy.deepcopy(options))
    config._attn_implementation = implementation
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model


def tokens(batch: int, seq: int, padded: str | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (batch, seq), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        if padded == "left":
            mask[row, : 2 * row] = 0
        elif padded == "right":
            mask[row, seq - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def results(model: nn.Module, padded: str | None) -> Iterator[Tensor]:
    """The model's floating-point results on a batch of its kind, without padded positions."""
    kind, given = model.main_input_name, tokens(3, 11, padded)
    if kind == "pixel_values":
        given = {kind: torch.linspace(-2, 2, 3 * 3 * 256).sin().view(3, 3, 16, 16)}
    elif kind == "input_values":
        given = {kind: torch.linspace(0, 900, 3 * 600).sin().view(3, 600)}
    elif model.config.is_encoder_decoder:
        given["decoder_input_ids"] = tokens(3, 6, None)["input_ids"]
    with torch.no_grad():
        out = model(**given)
    for result in out.to_tuple():
        if isinstance(result, Tensor) and result.is_floating_point():
            whole = result.shape[:2] != (3, 11) or "attention_mask" not in given
            yield result if whole else result[given["attention_mask"].bool()]


def tiny(kind: str, **options):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **options
        )
    if kind == "bert":
        return transformers.BertConfig(**sizes, intermediate_size=48, **options)
    if kind == "opt":
        return transformers.OPTConfig(
            **sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, **options
        )
    if kind == "t5":
        return transformers.T5Config(
            vocab_size=99,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            **options,
        )
    config = {"llama": transformers.LlamaConfig, "gemma2": transformers.Gemma2Config}[kind]
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    return config(**sizes, **options)


def pair(name: str, config) -> tuple[nn.Module, nn.Module]:
    """The same model with sdpa and with fastattn."""
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    stock = getattr(transformers, name)(config).eval()
    ours = copy.deepcopy(stock)
    ours.set_attn_implementation("fastattn")
    assert ours.config._attn_implementation == "fastattn"
    return stock, ours


def close_where(mask: Tensor, a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    kept = mask.bool()
    torch.testing.assert_close(a[kept], b[kept], rtol=tolerance, atol=tolerance)
