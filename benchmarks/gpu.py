"""GPU timings against every backend of torch; README.md beside this file has the protocol.

Writes ``gpu.csv``, ``gpu.md`` and, with matplotlib, ``gpu.png`` into ``--output``.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_cases import ATTENTION, LINEAR, SECOND_ORDER, STEPS, Attention, Linear, SecondOrder, Step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import backends, ops

L2_BYTES = 64 << 20
TIMINGS = 20
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FIELDS = ("case", "pass", "implementation", "ms", "TFLOP/s", "ours is faster by")


def wall_ms(step: Callable[[], object]) -> float:
    """The median time of a step, as the user sees it: launches and Python are part of it."""

    def steps(count):
        start = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count * 1e3

    steps(20)
    return statistics.median(steps(50) for _ in range(TIMINGS))


def median_ms(run: Callable[[int], object], rotations: int) -> float:
    """The median of TIMINGS runs by events, after a warm-up; run(n) uses the n-th set of inputs.

    A sleep on the GPU first lets the CPU run ahead, so that launches are not what is timed.
    """
    for n in range(3):
        run(n % rotations)
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMINGS)]
    torch.cuda._sleep(20_000_000)
    for n, (start, stop) in enumerate(events):
        start.record()
        run(n % rotations)
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def attention_inputs(case: Attention) -> tuple[list[list[Tensor]], Tensor | None]:
    """Sets of q, k, v that together outgrow L2, and the mask."""
    shape = (case.batch, case.heads, case.seq, case.dim)
    size = 3 * torch.empty((), dtype=case.dtype).itemsize * case.flops / 4 / case.seq
    size *= 2 if case.mask == "causal" else 1
    sets = max(1, min(8, int(2 * L2_BYTES / size) + 1))
    inputs = [
        [torch.randn(shape, dtype=case.dtype, device="cuda", requires_grad=True) for _ in range(3)]
        for _ in range(sets)
    ]
    mask = None
    if case.mask == "padding":
        lengths = torch.randint(case.seq // 4, case.seq + 1, (case.batch, 1, 1, 1), device="cuda")
        mask = torch.arange(case.seq, device="cuda") < lengths
    elif case.mask == "bool":
        mask = torch.rand(case.batch, 1, case.seq, case.seq, device="cuda") > 0.3
    elif case.mask == "bias":
        mask = torch.randn(1, case.heads, case.seq, case.seq, dtype=case.dtype, device="cuda")
    return inputs, mask


def attention_peers(case: Attention, mask: Tensor | None) -> dict[str, Callable]:
    causal = case.mask == "causal"

    def sdpa(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

        return run

    peers = {name: sdpa(backend) for name, backend in SDPA.items()}
    if case.mask in ("full", "causal") and case.dtype != torch.float32:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention)
        block_mask = None
        if causal:
            block_mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, case.seq, case.seq, device="cuda"
            )
        peers["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=block_mask)
    return peers


def forward_and_backward(function: Callable, inputs: list, flops: float) -> list[tuple]:
    """(pass, ms, TFLOP/s) of the forward without a graph and of the backward alone."""

    def forward(n):
        with torch.no_grad():
            return function(*inputs[n])

    rows = [("forward", median_ms(forward, len(inputs)), flops)]
    outs = [function(*x) for x in inputs]
    cotangents = [torch.randn_like(o) for o in outs]

    def backward(n):
        return torch.autograd.grad(outs[n], inputs[n], cotangents[n], retain_graph=True)

    rows.append(("backward", median_ms(backward, len(inputs)), 2.5 * flops))
    return [(name, ms, work / ms / 1e9) for name, ms, work in rows]


def run_attention(case: Attention) -> list[tuple]:
    inputs, mask = attention_inputs(case)
    causal = case.mask == "causal"

    def ours(q, k, v, backend=None):
        return fastattn.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, backend=backend
        )

    implementations = {"fastattn": ours}
    if backends.explain("attention", *inputs[0], mask).backend == "cuda":
        implementations["fastattn triton"] = functools.partial(ours, backend="triton")
    implementations |= attention_peers(case, mask)
    checked, rows = None, []
    for name, function in implementations.items():
        try:
            out = function(*inputs[0])
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:60]
            print(f"    {name} does not take it: {reason}", flush=True)
            continue
        if name == "fastattn":
            checked = out.detach().float()
        else:
            worst = (out.detach().float() - checked).abs().max().item()
            if not worst < (0.05 if case.dtype != torch.float32 else 1e-3):
                raise AssertionError(f"{case.name}: differs from {name} by {worst}")
        rows += [(case.name, p, name, *r) for p, *r in forward_and_backward(
            function, inputs, case.flops)]  # fmt: skip
    return rows


def run_second_order(case: SecondOrder) -> list[tuple]:
    """Ours alone: nobody else has them fused. The backward is there to be compared with."""
    shape = (case.batch, case.heads, case.seq, case.dim)
    q, k, v, t_q, t_k, t_v, cotangent = (
        torch.randn(shape, dtype=case.dtype, device="cuda") for _ in range(7)
    )
    numbers = (None, case.mask == "causal", case.dim**-0.5, 0.0)
    rest = (None, None, None, ops.NO_OPTIONS, "triton")
    inputs, tangents = (q, k, v, None), (t_q, t_k, t_v, None)
    results = ops.attention_forward(*inputs, *numbers, *rest)
    runs = {
        "forward": (1.0, lambda _: ops.attention_forward(*inputs, *numbers, *rest)),
        "jvp": (2.5, lambda _: ops.attention_jvp(*inputs, *tangents, *results, *numbers, *rest)),
        "backward": (
            2.5,
            lambda _: ops.attention_backward(
                cotangent, None, *inputs, *results, *numbers, [True] * 3 + [False], *rest
            ),
        ),
        "double backward": (
            6.0,
            lambda _: ops.attention_double_backward(
                cotangent, None, *inputs, *tangents, *results, *numbers, [True] * 4 + [False], *rest
            ),
        ),
    }
    rows = []
    with torch.no_grad():
        for name, (factor, run) in runs.items():
            ms = median_ms(run, 1)
            rows.append((case.name, name, "fastattn", ms, factor * case.flops / ms / 1e9))
    return rows


def run_linear(case: Linear, compile_peer: bool) -> list[tuple]:
    size = 2 * (case.rows * (case.n_in + case.n_out) + case.n_in * case.n_out)
    sets = max(1, min(16, int(2 * L2_BYTES / size) + 1))

    def tensors():
        shapes = ((case.rows, case.n_in), (case.n_out, case.n_in), (case.n_out,))
        return [
            torch.randn(s, dtype=torch.bfloat16, device="cuda").mul_(s[-1] ** -0.5).requires_grad_()
            for s in shapes
        ]

    def eager(x, w, b):
        return F.relu(F.linear(x, w, b))

    inputs = [tensors() for _ in range(sets)]
    implementations = {"fastattn": fastattn.linear_relu, "eager": eager}
    if backends.explain("linear_relu", *inputs[0]).backend == "cuda":
        implementations["fastattn triton"] = functools.partial(
            fastattn.linear_relu, backend="triton"
        )
    if compile_peer:
        implementations["compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs")
    worst = (fastattn.linear_relu(*inputs[0]) - eager(*inputs[0])).abs().max().item()
    if not worst < 0.05:
        raise AssertionError(f"{case.name}: differs from eager by {worst}")
    rows = []
    for name, function in implementations.items():
        cotangent = torch.randn(case.rows, case.n_out, dtype=torch.bfloat16, device="cuda")

        def step(n, function=function, cotangent=cotangent):
            return torch.autograd.grad(function(*inputs[n]), inputs[n], cotangent)

        def forward(n, function=function):
            with torch.no_grad():
                return function(*inputs[n])

        for what, run, work in (("forward", forward, 1), ("forward+backward", step, 3)):
            ms = median_ms(run, sets)
            rows.append((case.name, what, name, ms, work * case.flops / ms / 1e9))
    with torch.no_grad():
        addmm = median_ms(
            lambda n: torch._addmm_activation(inputs[n][2], inputs[n][0], inputs[n][1].t()), sets
        )
    rows.append((case.name, "forward", "_addmm_activation", addmm, case.flops / addmm / 1e9))
    return rows


def run_step(case: Step) -> list[tuple]:
    x = torch.randn(case.rows, 784, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(10, (case.rows,), device="cuda")

    def network():
        torch.manual_seed(0)
        layers = torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        return torch.nn.Sequential(*layers).to("cuda", torch.bfloat16)

    def ours(net, x, backend=None):
        layers = net[0], net[2]
        weights, biases = [n.weight for n in layers], [n.bias for n in layers]
        return fastattn.mlp(x, weights, biases, backend=backend)

    implementations = {"fastattn": ours, "eager": lambda net, x: net(x)}
    net = network()
    if backends.explain("mlp", x, [net[0].weight, net[2].weight]).backend == "cuda":
        implementations["fastattn triton"] = functools.partial(ours, backend="triton")
    worst = (ours(net, x) - net(x)).abs().max().item()
    if not worst < 0.05:
        raise AssertionError(f"{case.name}: differs from eager by {worst}")
    rows = []
    for name, function in implementations.items():
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

        def step(net=net, function=function, optimizer=optimizer):
            optimizer.zero_grad()
            F.cross_entropy(function(net, x), labels).backward()
            optimizer.step()

        ms = wall_ms(step)
        rows.append((case.name, "step", name, ms, case.flops / ms / 1e9))
    return rows


def with_ratios(rows: list[tuple]) -> list[tuple]:
    ours = {row[:2]: row[3] for row in rows if row[2] == "fastattn"}
    return [(*row, row[3] / ours[row[:2]]) for row in rows]


def write(rows: list[tuple], output: Path, title: str) -> None:
    with (output / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(rows)
    lines = [title, "", "| " + " | ".join(FIELDS) + " |", "|---" * len(FIELDS) + "|"]
    for case, what, name, ms, speed, ratio in rows:
        last = "" if name == "fastattn" else f"{ratio:.2f}x"
        lines.append(f"| {case} | {what} | {name} | {ms:.3f} | {speed:.0f} | {last} |")
    (output / "gpu.md").write_text("\n".join(lines) + "\n")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    cases = [row for row in rows if row[0].startswith("attention")]
    labels = sorted({row[:2] for row in cases})
    names = sorted({row[2] for row in cases})
    figure, axes = pyplot.subplots(figsize=(12, 0.45 * len(labels) + 2))
    for offset, name in enumerate(names):
        speed = {row[:2]: row[4] for row in cases if row[2] == name}
        places = [n + 0.8 * offset / len(names) for n in range(len(labels))]
        axes.barh(places, [speed.get(x, 0) for x in labels], 0.8 / len(names), label=name)
    axes.set_yticks(range(len(labels)), [" ".join(x) for x in labels])
    axes.set_xlabel("TFLOP/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(output / "gpu.png", dpi=120)


def environment() -> str:
    def first_line(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return "?"

    import triton

    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit = first_line("git", "rev-parse", "--short", "HEAD") or "?"
    return (
        f"{torch.cuda.get_device_name()}, driver {driver}, torch {torch.__version__}, "
        f"triton {triton.__version__}, Python {sys.version.split()[0]}, fastattn {commit}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    stop = time.monotonic() + options.seconds
    rows: list[tuple] = []
    failed = left_out = 0
    for case in [*ATTENTION, *SECOND_ORDER, *STEPS, *LINEAR]:
        remaining = stop - time.monotonic()
        if remaining < 0:
            left_out += 1
            continue
        print(case.name, flush=True)
        try:
            if isinstance(case, Attention):
                rows += run_attention(case)
            elif isinstance(case, SecondOrder):
                rows += run_second_order(case)
            elif isinstance(case, Step):
                rows += run_step(case)
            else:
                rows += run_linear(case, compile_peer=remaining > 40)
        except Exception as error:
            failed += 1
            print(f"    FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.cuda.empty_cache()
    title = environment()
    rows = with_ratios(rows)
    write(rows, options.output, title)
    print((options.output / "gpu.md").read_text())
    print(f"{failed} cases failed, {left_out} left out for lack of time")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
