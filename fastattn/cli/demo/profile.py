"""Where the time of a call goes, by kind of work."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch.autograd.profiler import profile

# The first kind whose pattern is found in an operation's name has its time.
_KINDS = {
    "attention": r"attention|attn",
    "linear layers": r"linear|addmm|^mm|^bmm|mkldnn|^mlp|gated",
    "norms": r"norm",
    "dropout": r"dropout|bernoulli",
    "activations": r"gelu|relu|silu|tanh|activation",
    "embeddings": r"embedding",
    "optimizer": r"adam|foreach|sgd|lerp|addcmul|addcdiv|sqrt",
}
OTHER = "copies, sums, loss"
KINDS = (*_KINDS, OTHER)


def seconds_by_kind(call: Callable[[], object]) -> dict[str, float]:
    """The seconds of processor time of torch's operations in one call. Python's own time, between
    them, is not in it. A linear layer of ours has its activation with it, a norm its dropout."""
    with profile(use_kineto=False) as found:  # Kineto writes lines of its own to the terminal
        call()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        if "::" in event.key and not event.key.startswith(("autograd::", "torch::")):
            seconds[_kind(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


def _kind(name: str) -> str:
    own = name.rpartition("::")[2].lower().lstrip("_")
    return next((kind for kind, known in _KINDS.items() if re.search(known, own)), OTHER)
