"""Arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastattn import __version__

# What bench knows.
OPS = (
    "attention", "linear", "linear_relu", "mlp", "dropout_add_norm", "encoder", "second_order",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="fastattn", description="Fused linear+ReLU and softmax attention for PyTorch."
    )
    root.add_argument("--version", action="version", version=f"fastattn {__version__}")
    commands = root.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser(
        "doctor", help="what is installed, which backend serves what, and why not"
    )
    doctor.add_argument(
        "--check", action="store_true", help="compare every kernel with the float64 reference"
    )
    doctor.add_argument(
        "--backend", choices=("cpu", "cuda", "triton"), help="with --check: only this one's kernels"
    )

    demo = commands.add_parser("demo", help="train on real data, stock torch beside fastattn")
    demo.add_argument("--quick", action="store_true", help="small and fast: a smoke test")
    demo.add_argument("--only", choices=("digits", "bert", "sentences"), help="one part only")
    demo.add_argument("--mnist", type=Path, metavar="DIR", help="folder with MNIST's IDX files")
    demo.add_argument("--model", help="any Hugging Face BERT-like model name or path")
    demo.add_argument("--epochs", type=float, help="epochs of the BERT fine-tuning")
    demo.add_argument("--batch-size", type=int, default=16, help="sentences a step (default 16)")
    demo.add_argument("--learning-rate", type=float, default=1e-4, help="default 1e-4")
    demo.add_argument("--warmup-ratio", type=float, default=0.1, help="default 0.1")
    demo.add_argument("--weight-decay", type=float, default=0.01, help="default 0.01")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--output", type=Path, default=Path("fastattn-demo"), help="folder of the report"
    )

    bench = commands.add_parser("bench", help="paired timings of the kernels beside torch's")
    bench.add_argument(
        "--op", action="append", choices=OPS, help="again for more; default all, none with --models"
    )
    bench.add_argument(
        "--models", action="store_true",
        help="whole models: training steps and inference beside eager, ONNX Runtime, OpenVINO",
    )  # fmt: skip
    bench.add_argument(
        "--quick", action="store_true", help="with --models: tiny ones, a smoke test"
    )
    bench.add_argument("--filter", default="", help="only cases whose line contains this")
    bench.add_argument(
        "--peers", choices=("default", "all"), default="default",
        help="all: SDPA's math path, torch.compile and oneDNN's fused linear too",
    )  # fmt: skip
    bench.add_argument(
        "--grid", action="store_true",
        help="attention over lengths, head dims and dtypes; models in all their layers, dtypes "
        "and fills",
    )  # fmt: skip
    bench.add_argument(
        "--seconds", type=_positive, default=2.0, help="spent on a case, about (default 2)"
    )
    bench.add_argument("--compare", type=Path, metavar="OLD.csv", help="show what changed since")
    bench.add_argument("--output", type=Path, metavar="DIR", help="write bench.csv and bench.html")
    return root


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    root = parser()
    options = root.parse_args(arguments)
    if options.command == "doctor":
        if options.backend is not None and not options.check:
            root.error("--backend: expected beside --check, which was not given")
        from fastattn.cli.doctor import doctor

        return doctor(check=options.check, backend=options.backend)
    if options.command == "bench":
        from fastattn.cli.bench import bench

        if options.quick and not options.models:
            root.error("--quick: expected beside --models, which was not given")
        options.op = options.op or (() if options.models else OPS)
        return bench(options)
    from fastattn.cli.demo import demo

    return demo(options)
