"""``fastattn doctor``: versions, what was built, which backend serves which call."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

import fastattn
from fastattn import _extension, backends
from fastattn.ops import triton

_GOOD, _BAD, _NOTE = "[green]ok[/]", "[red]missing[/]", "[yellow]note[/]"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _calls() -> list[tuple[str, backends.Explanation]]:
    q = torch.empty(1, 2, 8, 16)
    x, w, b = torch.empty(4, 8), torch.empty(3, 8), torch.empty(3)
    explain = backends.explain
    return [
        ("attention, float32", explain("attention", q, q, q)),
        ("attention, bfloat16, dropout", explain("attention", *[q.bfloat16()] * 3, dropout_p=0.1)),
        ("attention, float64, causal", explain("attention", *[q.double()] * 3, is_causal=True)),
        ("attention, sliding window", explain("attention", q, q, q, window_size=(4, 0))),
        ("linear_relu, float32", explain("linear_relu", x, w, b)),
        ("mlp, float32", explain("mlp", x, [w], [b])),
    ]


def doctor(console: Console | None = None) -> int:
    """Prints the state of the installation; 0 when the native CPU kernels work, 1 otherwise."""
    console = console or Console()
    table = Table(title="fastattn doctor", show_header=False, title_justify="left")
    table.add_column(justify="center")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(_GOOD, "fastattn", f"{fastattn.__version__}, Python {platform.python_version()}")
    table.add_row(_GOOD, "torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    for package in ("triton", "transformers"):
        version = _version(package)
        table.add_row(_GOOD if version[0].isdigit() else _NOTE, package, version)
    failure = _extension.why_not()
    if failure is None:
        features = " ".join(_extension.cpu_features()) or "baseline only"
        table.add_row(_GOOD, "native library", "loaded")
        table.add_row(_GOOD, "CPU kernels", f"{_extension.cpu_isa()} (this CPU: {features})")
    else:
        table.add_row(_BAD, "native library", failure)
    cuda = _extension.why_not_cuda() or "loaded"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees no GPU"
    serves = "cuda" in backends.available()
    table.add_row(_GOOD if serves else _NOTE, "CUDA kernels (Hopper)", f"{cuda}; {gpu}")
    against = triton.why_not() or (None if torch.cuda.is_available() else "torch sees no GPU")
    table.add_row(_NOTE if against else _GOOD, "Triton kernels", against or "serve CUDA tensors")
    console.print(table)

    served = Table(title="Which backend serves a call", title_justify="left")
    served.add_column("call")
    served.add_column("backend")
    served.add_column("why not the others", overflow="fold")
    for call, explanation in _calls():
        others = [
            f"{name}: {'; '.join(why)}"
            for name, why in explanation.reasons.items()
            if name != explanation.backend and why
        ]
        served.add_row(call, explanation.backend, "\n".join(others))
    console.print(served)
    return 0 if failure is None else 1
