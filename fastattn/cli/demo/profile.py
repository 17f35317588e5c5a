"""Where the time of a call goes, by kind of work."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator

from torch.autograd.profiler import profile

# The first kind whose pattern is found in an operation's name has its time.
_KINDS = {
    # torch's attention with dropout is two batched products and a softmax.
    "attention": r"attention|attn|bmm|(?<!log_)softmax",
    "linear layers": r"linear|addmm|^mm|mkldnn|^mlp|gated",
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
    with _without_stderr(), profile(use_kineto=False) as found:
        call()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in found.key_averages():
        if "::" in event.key and not event.key.startswith(("autograd::", "torch::")):
            seconds[_kind(event.key)] += event.self_cpu_time_total / 1e6
    return seconds


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """torch's profiler writes lines of its own there, which no option turns off."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _kind(name: str) -> str:
    own = name.rpartition("::")[2].lower().lstrip("_")
    return next((kind for kind, known in _KINDS.items() if re.search(known, own)), OTHER)
