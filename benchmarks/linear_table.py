"""The kernels' product of a Linear beside torch's, over rows, layers and dtypes, paired:

python benchmarks/linear_table.py --output benchmarks/results/MACHINE/linear.csv

``fastattn._products`` has the rule that these numbers gave. An AVX2 machine is imitated by
FASTATTN_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import _extension
from fastattn.cli.bench import measure, report
from fastattn.cli.bench.case import OURS, Case, Run
from fastattn.functional import mlp

ROWS = (1, 4, 16, 64, 512, 4096)
LAYERS = ((64, 64), (128, 784), (384, 384), (384, 1536), (1536, 384), (768, 3072))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(dtypes: Sequence[torch.dtype], most_rows: int) -> Iterator[Case]:
    """Forward without autograd; a step is forward and backward, all three gradients."""
    for dtype, (n_in, n_out), rows in itertools.product(dtypes, LAYERS, ROWS):
        if rows > most_rows:
            continue

        def build(step: bool, dtype=dtype, n_in=n_in, n_out=n_out, rows=rows) -> dict[str, Run]:
            inputs = [
                torch.randn(rows, n_in).to(dtype),
                (torch.randn(n_out, n_in) / n_in**0.5).to(dtype),
                torch.randn(n_out).to(dtype),
            ]
            functions = {
                OURS: lambda x, w, b: mlp(x, [w], [b], backend="cpu"),
                "F.linear": F.linear,
            }
            run = _step if step else _forward
            return {name: run(function, inputs) for name, function in functions.items()}

        flops = 2.0 * rows * n_in * n_out
        moved = dtype.itemsize * float(rows * n_in + n_in * n_out + rows * n_out)
        for direction, factor in (("forward", 1), ("step", 3)):
            yield Case(
                "linear", f"{rows}x{n_in}->{n_out}", dtype, direction, factor * flops,
                factor * moved, lambda step=direction == "step", build=build: build(step),
            )  # fmt: skip


def _forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    return torch.no_grad()(lambda: [function(*inputs)])


def _step(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    leaves = [x.clone().requires_grad_() for x in inputs]
    shape, generator = (inputs[0].shape[0], inputs[1].shape[0]), torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape, generator=generator).to(inputs[0].dtype)
    return lambda: torch.autograd.grad(function(*leaves), leaves, cotangent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each case")
    parser.add_argument("--dtypes", nargs="+", default=[str(d)[6:] for d in DTYPES])
    parser.add_argument("--most-rows", type=int, default=ROWS[-1])
    options = parser.parse_args()
    print(
        f"{_extension.cpu_isa()}, {torch.get_num_threads()} threads, torch's products: bfloat16 "
        f"{torch.ops.mkldnn._is_mkldnn_bf16_supported()}, "
        f"float16 {torch.ops.mkldnn._is_mkldnn_fp16_supported()}"
    )
    results = []
    roofline = measure.probe()
    for case in cases([getattr(torch, name) for name in options.dtypes], options.most_rows):
        # Few rounds of what takes seconds; many of what a neighbour may interrupt.
        for result in measure.measure(case, options.seconds, least=3, most=4000):
            results.append(result)
            print(*case.key[1:], result.error or f"{result.ratio:.2f}", flush=True)
    for result in results:
        object.__setattr__(result, "roofline", roofline)
    report.write_csv(options.output, results)


if __name__ == "__main__":
    main()
