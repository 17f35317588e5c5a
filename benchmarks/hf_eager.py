"""By how much transformers' own eager attention differs from its own sdpa, and why: fastattn has
sdpa's meaning, and a reader of the table should know where that is not eager's."""

from __future__ import annotations

from typing import Any

from hf_models import PADDING, TOLERANCE, build, difference, run
from torch import Tensor, nn

LATER = (
    "sdpa sees later tokens where nothing is padded: transformers then leaves the causal mask "
    "out, and the layer does not say that it is causal, or adds a mask of its own"
)
EMPTY = (
    "a pooled result is that of a padded position, which has nothing to attend to: sdpa gives 0 "
    "for it, eager attention the mean of all values"
)
UNEXPLAINED = "unexplained"


def compare(
    kind: type[nn.Module],
    config: Any,
    stock: nn.Module,
    batches: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
) -> dict[str, Any]:
    """What a row of the table gets: the differences, one for each of PADDING, with the reasons for
    those that are not rounding; or why the class has no eager attention here."""
    try:
        eager = build(kind, config, "eager")
        eager.load_state_dict(stock.state_dict(), strict=False)
        results = [run(eager, given) for given in batches]
    except Exception as error:
        return {"no eager": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    apart = [difference(a, b) for a, b in zip(expected, results, strict=True)]
    row: dict[str, Any] = {"eager": apart}
    reasons = {}
    for padded, x, given, a, b in zip(PADDING, apart, batches, expected, results, strict=True):
        if x >= TOLERANCE:
            reasons[_reason(padded, stock, eager, given, a, b)] = None
    if reasons:
        row["eager why"] = list(reasons)
    return row


def _reason(
    padded: str | None,
    stock: nn.Module,
    eager: nn.Module,
    given: dict[str, Tensor],
    expected: dict[str, Tensor],
    results: dict[str, Tensor],
) -> str:
    may_see = padded is None or "decoder_input_ids" in given  # which are never padded here
    if may_see and _foresees(stock, given) and not _foresees(eager, given):
        return LATER
    by_position = {k: x for k, x in expected.items() if _is_by_position(x, given)}
    if padded is not None and by_position and difference(by_position, results) < TOLERANCE:
        return EMPTY
    return UNEXPLAINED


def _is_by_position(x: Tensor, given: dict[str, Tensor]) -> bool:
    """Whether ``run`` took the padded positions out."""
    mask = given.get("attention_mask")
    return mask is not None and x.shape[0] == int(mask.sum())


def _foresees(model: nn.Module, given: dict[str, Tensor]) -> bool:
    """Whether results at the first position depend on the last token."""
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    if name not in given:
        return False
    tokens = given[name]
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 7) % 90
    rows, length = tokens.shape
    firsts = []
    for ids in (tokens, changed):
        results = run(model, given | {name: ids})
        firsts.append({
            key: x.reshape(rows, length, -1)[:, 0]
            for key, x in results.items()
            if x.shape[0] == rows * length or x.shape[:2] == (rows, length)
        })  # fmt: skip
    return difference(*firsts) > TOLERANCE


def explanations(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the end of the table."""
    lines = []
    for reason in (LATER, EMPTY, UNEXPLAINED):
        names = sorted(row["name"] for row in rows if reason in row.get("eager why", ()))
        if names:
            lines.append(f"- {', '.join(names)}: {reason}.")
    missing = sorted(row["name"] for row in rows if "no eager" in row)
    if missing:
        lines.append(f"- {', '.join(missing)}: eager attention does not run with these sizes.")
    if not lines:
        return []
    head = "Where transformers' eager attention differs from its sdpa by more than rounding:"
    return ["", head, "", *lines]
