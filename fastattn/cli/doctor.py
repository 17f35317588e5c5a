"""``fastattn doctor``: versions, what was built, which backend serves which call."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.console import Console
from rich.table import Table

import fastattn
from fastattn import _extension, backends
from fastattn.cli.check import check as check_kernels
from fastattn.functional import packed_bytes, packing
from fastattn.ops import triton
from fastattn.verification import families, first_use

_GOOD, _BAD, _NOTE = "[green]ok[/]", "[red]missing[/]", "[yellow]note[/]"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _calls(device: str) -> list[tuple[str, backends.Explanation]]:
    """Some calls with tiny tensors on ``device``, and who serves them."""
    q = torch.empty(1, 2, 8, 64, device=device)
    x, w, b = (torch.empty(shape, device=device) for shape in ((4, 8), (3, 8), (3,)))
    explain = backends.explain
    half = [q.bfloat16()] * 3
    calls = [
        ("attention, float32", explain("attention", q, q, q)),
        ("attention, bfloat16, dropout", explain("attention", *half, dropout_p=0.1)),
        ("attention, float64, causal", explain("attention", *[q.double()] * 3, is_causal=True)),
        ("attention, sliding window", explain("attention", q, q, q, window_size=(4, 0))),
        ("linear_relu, float32", explain("linear_relu", x, w, b)),
        ("mlp, float32", explain("mlp", x, [w], [b])),
    ]
    if device == "cpu":
        return calls
    trained = [y.detach().requires_grad_() for y in half]
    layer = [y.bfloat16() for y in (x, w, b)]
    calls += [
        ("attention, bfloat16", explain("attention", *half)),
        ("attention, bfloat16, gradients", explain("attention", *trained)),
        ("linear_relu, bfloat16", explain("linear_relu", *layer)),
        ("mlp, bfloat16", explain("mlp", layer[0], layer[1:2], layer[2:])),
    ]
    return [(f"{device}: {call}", explanation) for call, explanation in calls]


def _self_check(backend: str, family: str) -> str:
    """What is known of a family's kernels on the current GPU."""
    if not backends.self_check:
        return "off (FASTATTN_SELF_CHECK=0)"
    found = {
        k: failure for k, failure in first_use.known(None).items() if k[:2] == (backend, family)
    }
    lines = [f"[red]failed[/]: {k}: {failure}" for k, failure in found.items() if failure]
    good = ", ".join(k.instance for k, failure in found.items() if not failure)
    lines += [f"[green]verified[/]: {good}"] if good else []
    return "\n".join(lines) or "not yet"


def _self_checks() -> Table:
    table = Table(title="Kernels at their first use on this GPU", title_justify="left")
    for column in ("backend", "family", "self-check"):
        table.add_column(column, overflow="fold")
    for backend in ("cuda", "triton"):
        if backends.unavailable(backend) is None:
            for family in families.at_first_use(backend):
                table.add_row(backend, family, _self_check(backend, family))
    return table


def _kept() -> list[tuple[str, str]]:
    """Libraries of an earlier build that are in use because the last build failed."""
    native, cuda = _extension.build_info, _extension.build_info.get("cuda") or {}
    found = {"native library": (native, "native"), "CUDA library": (cuda, "built")}
    return [
        (what, f"of an earlier build, as the last one failed: {facts['reason']}; {facts['hint']}")
        for what, (facts, there) in found.items()
        if facts.get(there) and facts.get("reason")
    ]


def doctor(
    console: Console | None = None, *, check: bool = False, backend: str | None = None
) -> int:
    """Prints the state of the installation; 0 when the native CPU kernels work, 1 otherwise.

    Args:
        check: compares the kernels of ``backend``, or of all, with the reference too; the result
            is then 1 where one of them failed, 0 otherwise.
    """
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
    failure = _extension.load_failure()
    if failure is None:
        features = " ".join(_extension.cpu_features()) or "baseline only"
        isa = _extension.cpu_isa()
        known = f"{isa} (this CPU: {features})" if isa else "loaded; which ones, only _C could say"
        table.add_row(_GOOD, "native library", "loaded")
        table.add_row(_GOOD, "CPU kernels", known)
    else:
        table.add_row(_BAD, "native library", failure)
    if packing.enabled():
        kept = f"on: {packed_bytes() / 2**20:.1f} MiB of panels (fastattn.pack_weights)"
    else:
        kept = "off (fastattn.pack_weights)"
    table.add_row(_NOTE, "packed weights", kept)
    for what, facts in _kept():
        table.add_row(_NOTE, what, facts)
    cuda = _extension.cuda_load_failure() or "loaded"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch sees no GPU"
    serves = "cuda" in backends.available()
    table.add_row(_GOOD if serves else _NOTE, "CUDA kernels (Hopper)", f"{cuda}; {gpu}")
    against = triton.load_failure() or (None if torch.cuda.is_available() else "torch sees no GPU")
    table.add_row(_NOTE if against else _GOOD, "Triton kernels", against or "serve CUDA tensors")
    console.print(table)

    served = Table(title="Which backend serves a call", title_justify="left")
    served.add_column("call")
    served.add_column("backend")
    served.add_column("why not the others", overflow="fold")
    calls = _calls("cpu") + (_calls("cuda") if torch.cuda.is_available() else [])
    for call, explanation in calls:
        others = [
            f"{name}: {'; '.join(why)}"
            for name, why in explanation.reasons.items()
            if name != explanation.backend and why
        ]
        served.add_row(call, explanation.backend, "\n".join(others))
    console.print(served)
    if torch.cuda.is_available():
        console.print(_self_checks())
    if check:
        return check_kernels(console, backend)
    return 0 if failure is None else 1
