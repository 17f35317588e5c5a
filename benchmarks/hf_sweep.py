"""Every model class of Hugging Face transformers that a small config builds, with fastattn's
attention against sdpa's: by name, by ``patch``, in batches without padding, padded left and right.

``make hf-sweep`` writes the table. The classes run in processes of their own with a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastattn
from fastattn.integrations.transformers import NAME, register

BATCH, SECONDS_A_BATCH, SECONDS_A_CLASS = 24, 240, 40
PARAMETERS = 40_000_000  # a model above these was not made small
TOLERANCE = 1e-4  # of the largest result; float32 with weights of unit gain stays below 1e-5
PADDING = (None, "left", "right")

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
VARIANTS = ((), ("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim"))


def small_config(kind: type, left_out: tuple[str, ...] = (), depth: int = 0) -> Any:
    """A config of that class with every size that it knows made small."""
    stock = kind()
    options = {
        name: size
        for name, size in SMALL.items()
        if name not in left_out
        and isinstance(getattr(stock, name, None), int | float)
        and _settable(kind, name)
    }
    for name in getattr(stock, "sub_configs", None) or {}:
        inner = getattr(stock, name, None)
        if inner is not None and depth < 3:
            options[name] = small_config(type(inner), left_out, depth + 1)
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


def try_class(name: str) -> dict[str, Any]:
    """One row of the table."""
    kind = getattr(transformers, name)
    reason = ""
    for left_out, text_alone in itertools.product(VARIANTS, (False, True)):
        try:
            config = small_config(kind.config_class, left_out)
            try:
                stock = build(kind, config, "sdpa")
            except ValueError as error:
                if "scaled_dot_product_attention" not in str(error):
                    raise
                stock = build(kind, config, "eager")
            if sum(p.numel() for p in stock.parameters()) > PARAMETERS:
                return {"name": name, "verdict": "not built", "why": "too large"}
            draw_weights(stock)
            batches = [inputs(stock, padded, text_alone) for padded in PADDING]
            expected = [run(stock, given) for given in batches]
            again = [run(stock, given) for given in batches]
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {_line(error)}"
            continue
        if any(difference(a, b) > 0 for a, b in zip(expected, again, strict=True)):
            return {"name": name, "verdict": "not built", "why": "two runs of the stock differ"}
        return compare(name, kind, config, stock, batches, expected)
    return {"name": name, "verdict": "not built", "why": reason}


def compare(
    name: str,
    kind: type[nn.Module],
    config: Any,
    stock: nn.Module,
    batches: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "stock": stock.config._attn_implementation}
    patched = copy.deepcopy(stock)
    report = fastattn.patch(patched)
    entries = [e for e in report.entries if e.before.endswith(" attention")]
    row["patch"] = "; ".join(dict.fromkeys("swapped" if e.after else e.reason for e in entries))
    models = {"patch": patched}
    row["verdict"] = "served"
    try:
        models["name"] = build(kind, config, NAME)
        models["name"].load_state_dict(stock.state_dict(), strict=False)
    except ValueError as error:
        row |= {"verdict": "refused", "why": _line(error)}
    if "softcap" in row["patch"]:  # sdpa leaves it out: eager attention is what the name stands for
        eager = build(kind, config, "eager")
        eager.load_state_dict(stock.state_dict(), strict=False)
        expected = [run(eager, given) for given in batches]
        stock, models = eager, {"name": models["name"]}
    elif row["verdict"] == "served" and "swapped" not in row["patch"]:
        row["verdict"] = "no attention"
    generated = None
    with contextlib.suppress(Exception):
        generated = generate(stock, batches[1])
    row["generate"] = generated is not None
    for model in models.values():
        if generated is not None and not difference(generated, generate(model, batches[1])) < 1e-3:
            return row | {"verdict": "wrong", "why": "other tokens or scores generated"}
        for given, right in zip(batches, expected, strict=True):
            try:
                worst = difference(right, run(model, given))
            except ValueError as error:
                row |= {"verdict": "wrong", "why": f"refused at the call: {_line(error)}"}
                return row
            row["worst"] = max(row.get("worst", 0.0), worst)
            if not worst < TOLERANCE:
                row |= {"verdict": "wrong", "why": f"differs by {worst:.2g}"}
    return row


def _line(error: Exception) -> str:
    words = str(error).strip().removeprefix(f'attn_implementation="{NAME}": ')
    return re.split(r"\. |\n", words)[0][:160]


# --- the processes --------------------------------------------------------------------------------


def class_names() -> list[str]:
    """One class or more for each architecture: with heads for text, else the bare model."""
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    modules, names = set(), {}
    for table in tables:
        values = itertools.chain(*((v,) if isinstance(v, str) else v for v in table.values()))
        for name in dict.fromkeys(values):
            try:
                kind = getattr(transformers, name)
                new = kind.config_class is not None and kind.__module__ not in modules
            except (AttributeError, ImportError):
                continue
            if new or (table is not auto.MODEL_MAPPING_NAMES):
                modules.add(kind.__module__)
                names[name] = None
    return list(names)


class OutOfTime(BaseException):
    """What no ``except Exception`` on the way catches."""


def work(names: list[str], output: Path) -> None:
    """Appends a line for each class."""

    def expire(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, expire)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    register()
    with output.open("a") as lines:
        for name in names:
            signal.alarm(SECONDS_A_CLASS)
            try:
                row = try_class(name)
            except (Exception, OutOfTime) as error:
                row = {"name": name, "verdict": "not built", "why": f"{type(error).__name__}"}
            signal.alarm(0)
            print(json.dumps(row), file=lines, flush=True)


def sweep(names: list[str], lines: Path) -> list[dict[str, Any]]:
    lines.unlink(missing_ok=True)
    left = names
    while left:
        command = [sys.executable, __file__, "--lines", str(lines), "--classes", *left[:BATCH]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, timeout=SECONDS_A_BATCH, env=environment, stderr=subprocess.DEVNULL
            )
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        done = {row["name"] for row in rows}
        batch = [name for name in left[:BATCH] if name not in done]
        if batch:  # the process ended in the first of them
            row = {"name": batch[0], "verdict": "not built", "why": "the process ended"}
            with lines.open("a") as f:
                print(json.dumps(row), file=f)
        left = [*batch[1:], *left[BATCH:]]
        print(f"{len(names) - len(left)} of {len(names)}", flush=True)
    return [json.loads(line) for line in lines.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    text = [
        f"# Model classes of transformers {transformers.__version__}, torch {torch.__version__}",
        "",
        f"`make hf-sweep`: {counts['served']} served, {counts['refused']} refused, "
        f"{counts['wrong']} wrong, {counts['no attention']} whose small model has no layer that "
        f"asks for attention, {counts['not built']} that the sweep's small configs and inputs "
        f"do not build or run. Served: every result within {TOLERANCE:g} of the stock model's, by "
        'name (`attn_implementation="fastattn"`) and by `patch`, without padding, padded left and '
        "right, and generated with a static cache and two beams where the table says so. Refused: "
        "by name with these words, and `patch` leaves it, or that part of it, as it is.",
        "",
        "| class | verdict | worst difference | generated | by name | by `patch` |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["verdict"] != "wrong", r["verdict"], r["name"])):
        if row["verdict"] != "not built":
            worst = f"{row['worst']:.1e}" if "worst" in row else ""
            generated = "yes" if row["generate"] else ""
            why = row.get("why", "served")
            cells = (row["name"], row["verdict"], worst, generated, why, row["patch"])
            text.append(f"| {' | '.join(cells)} |")
    missing = sorted(row["name"] for row in rows if row["verdict"] == "not built")
    return "\n".join([*text, "", f"Not built or not run: {', '.join(missing)}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("hf-sweep.md"))
    parser.add_argument("--lines", type=Path, default=None, help="what the processes write")
    parser.add_argument("--classes", nargs="*", help="work on these in this process")
    options = parser.parse_args()
    if options.classes:
        work(options.classes, options.lines)
        return 0
    lines = options.lines or options.output.with_suffix(".jsonl")
    rows = sweep(class_names(), lines)
    options.output.write_text(table(rows))
    print(table(rows).splitlines()[2])
    return 1 if any(row["verdict"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
