"""``torch.compile(model, backend="fastattn")``: kernels in models whose forward is their own.

Dynamo captures what a model calls and guards what the capture depends on: arguments, flags, hooks,
modes. The backend puts kernels into that graph (``fastattn.integrations.graph``) and runs the graph
with torch's eager operations. It generates no code, so that a model compiles in seconds, autograd
sees each call, and a graph for dynamic shapes serves all lengths.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence

from torch import fx

from fastattn.backends import FastAttnWarning
from fastattn.integrations.graph import with_kernels
from fastattn.integrations.report import CompileReport

NAME = "fastattn"

_lock = threading.Lock()
_report = CompileReport()


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[object], **options: object
) -> Callable[..., object]:
    """The compiler backend, as ``torch.compile`` calls it.

    torch finds it by the name ``"fastattn"`` where the package is installed. In a checkout that is
    not installed, give the function itself: ``torch.compile(model, backend=compiler.backend)``.

    Dropout that a kernel takes draws other elements than torch's for the same seed.

    As with any other backend, Dynamo sees hooks that are put on a module after compilation only
    where ``torch._dynamo.config.skip_nnmodule_hook_guards`` is False.

    Args:
        gm: the graph of torch's functions that Dynamo captured; it stays as it is.
        example_inputs: not read.
        options: what ``torch.compile`` was given as ``mode`` and ``options``: nothing is allowed.

    Returns:
        The function that runs the graph with kernels in it.

    Raises:
        ValueError: ``mode`` or ``options`` was given.

    >>> import torch, fastattn
    >>> from fastattn.integrations import compiler
    >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU())
    >>> torch.compile(layers, backend=compiler.backend)(torch.randn(4, 8)).shape
    torch.Size([4, 6])
    >>> fastattn.compile_report().graphs > 0
    True
    """
    given = {name: x for name, x in options.items() if x and x != "default"}
    if given:
        names = " and ".join(given)
        raise ValueError(f"{names}: the backend fastattn has none, got {given}")
    report = CompileReport(graphs=1)
    try:
        fused = with_kernels(gm, report)
    except Exception as error:  # an unforeseen graph: the model itself runs
        warnings.warn(
            f"torch.compile(backend='fastattn') leaves a graph as it is: {error!r}. Please report "
            "it to the project's issue tracker",
            FastAttnWarning,
            stacklevel=2,
        )
        fused, report = gm, CompileReport(graphs=1)
    with _lock:
        _report.graphs += 1
        known = set(_report.entries)
        _report.entries += [e for e in report.entries if e not in known]
    return fused.forward


def compile_report() -> CompileReport:
    """What the backend ``"fastattn"`` fused in this process, what it left alone, and why.

    Returns:
        The report of all graphs since the start, or since ``torch.compiler.reset()``. A graph that
        Dynamo captures again (for another mode, or for shapes that became dynamic) counts again;
        an entry that occurs twice is listed once.

    >>> import torch, fastattn
    >>> torch.compiler.reset()
    >>> print(fastattn.compile_report())
    fastattn: 0 graphs; nothing fused; 0 left alone
    """
    with _lock:
        return CompileReport(list(_report.entries), graphs=_report.graphs)


def register_with_accelerate() -> None:
    """Makes accelerate accept the backend's name, and with it the Trainer's
    ``TrainingArguments(torch_compile_backend="fastattn")``.

    accelerate has an enum of the backends and asks Dynamo for no other; this adds a member. Without
    accelerate nothing is done. Idempotent.
    """
    try:
        from accelerate.utils import DynamoBackend
    except ImportError:
        return
    value = NAME.upper()
    if value in DynamoBackend:
        return
    member = str.__new__(DynamoBackend, value)
    member._name_ = member._value_ = value
    DynamoBackend._member_map_[value] = DynamoBackend._value2member_map_[value] = member
    DynamoBackend._member_names_.append(value)


def _reset() -> None:
    """Dynamo calls it in ``torch.compiler.reset()``."""
    with _lock:
        _report.entries.clear()
        _report.graphs = 0


vars(backend)["reset"] = _reset
