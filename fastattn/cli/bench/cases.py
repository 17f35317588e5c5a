"""What is timed, by op."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastattn.cli.bench.attention import attention_cases
from fastattn.cli.bench.case import Case
from fastattn.cli.bench.layers import layer_cases
from fastattn.cli.bench.linear import linear_cases, mlp_cases
from fastattn.cli.bench.models import model_cases
from fastattn.cli.bench.norm import norm_cases
from fastattn.cli.bench.second_order import second_order_cases


def cases(ops: Sequence[str], peers: str, grid: bool) -> Iterator[Case]:
    """Those of ``ops``, names of ``fastattn.cli.main.OPS``."""
    of_op = {
        "attention": lambda: attention_cases(peers, grid),
        "linear": lambda: layer_cases(peers),
        "linear_relu": lambda: linear_cases(peers),
        "mlp": lambda: mlp_cases(peers),
        "dropout_add_norm": lambda: norm_cases(peers),
        "encoder": lambda: model_cases(peers),
        "second_order": second_order_cases,
    }
    for op in ops:
        yield from of_op[op]()
