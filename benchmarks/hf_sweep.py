"""Every model class of Hugging Face transformers that a small config builds, with fastattn's
attention against sdpa's: by name, by ``patch``, in batches without padding, padded left and right.

``make hf-sweep`` writes the table. The classes run in processes of their own with a time limit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hf_eager
import torch
import transformers
from hf_models import (
    PADDING,
    TOLERANCE,
    VARIANTS,
    build,
    difference,
    draw_weights,
    generate,
    inputs,
    run,
    small_config,
)
from torch import Tensor, nn

import fastattn
from fastattn.functional import _served
from fastattn.integrations.transformers import NAME, register

BATCH, SECONDS_A_BATCH, SECONDS_A_CLASS = 24, 600, 90
PARAMETERS = 40_000_000  # a model above these was not made small


def try_class(name: str) -> dict[str, Any]:
    """One row of the table."""
    kind = getattr(transformers, name)
    reason, row = "", None
    for variant, text_alone in itertools.product(VARIANTS, (False, True)):
        try:
            config = small_config(kind.config_class, variant)
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
        found = compare(name, kind, config, stock, batches, expected)
        if found["verdict"] == "wrong" or "no eager" not in found:
            return found
        row = row or found  # sizes that eager attention can run may follow
    return row or {"name": name, "verdict": "not built", "why": reason}


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
    if row["stock"] != "eager":
        row |= hf_eager.compare(kind, config, stock, batches, expected)
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
    # Small models would run torch's own code.
    _served.LEAST_WORK = _served.LEAST_ATTENTION = _served.LEAST_RMS_NORM = _served.LEAST_ROWS = 0
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
        "by name with these words, and `patch` leaves it, or that part of it, as it is. The last "
        "difference is that of transformers' own eager attention from its sdpa, whose meaning "
        "fastattn's has.",
        "",
        "| class | verdict | worst difference | generated | by name | by `patch` | eager, sdpa |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["verdict"] != "wrong", r["verdict"], r["name"])):
        if row["verdict"] != "not built":
            worst = f"{row['worst']:.1e}" if "worst" in row else ""
            generated = "yes" if row["generate"] else ""
            why = row.get("why", "served")
            eager = f"{max(row['eager']):.1e}" if "eager" in row else ""
            cells = (row["name"], row["verdict"], worst, generated, why, row["patch"], eager)
            text.append(f"| {' | '.join(cells)} |")
    missing = sorted(row["name"] for row in rows if row["verdict"] == "not built")
    text += ["", f"Not built or not run: {', '.join(missing)}."]
    return "\n".join([*text, *hf_eager.explanations(rows), ""])


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
