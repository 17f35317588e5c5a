"""The first use of a kernel on a GPU: it solves one small problem, once for each GPU model, driver
and set of versions, and what came of it is kept.

The check runs in a thread and on a stream of its own, which have none of the caller's modes, hooks,
autocast, device or stream; its inputs come from a generator of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from fastattn.verification import families, record
from fastattn.verification.families import Outcome
from fastattn.verification.problems import Case, Device
from fastattn.verification.record import Kernel

_lock = threading.Lock()
_known: dict[int, dict[Kernel, str]] = {}  # of each GPU: why a kernel failed, "" where it did not
_streams: dict[int, torch.cuda.Stream] = {}  # of each GPU
_busy: set[int] = set()  # threads inside of a check


def kernel_of(backend: str, family: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel that serves a call. Triton compiles one for each power of two of the head dim."""
    rounded = max(16, 1 << (head_dim - 1).bit_length()) if head_dim else 0
    return Kernel(backend, family, str(dtype).removeprefix("torch."), rounded)


def known(gpu: int | None) -> dict[Kernel, str]:
    """Why each kernel that was checked on this GPU failed, "" of those that did not. Nothing is
    run."""
    index = _index(gpu)
    if index is None:
        return {}
    found = _known.get(index)
    if found is None:
        found = _known.setdefault(index, record.read(record.identity(index)))
    return found


def check(kernel: Kernel, gpu: int | None) -> str | None:
    """Why ``kernel`` failed on this GPU, "" where it did not, None where that is not known and now
    is no time to find out. The first call that can solves the kernel's problem."""
    found = known(gpu)
    if kernel in found:
        return found[kernel]
    index = _index(gpu)
    if index is None or threading.get_ident() in _busy or _untimely():
        return None
    with _lock:
        if kernel not in found:  # by another thread, meanwhile
            outcome = _in_a_thread(kernel, index)
            if outcome is None:
                return None
            found[kernel] = "" if outcome.good else str(outcome)
            if outcome.lasting:
                record.write(record.identity(index), kernel, found[kernel])
        return found[kernel]


def forget(backend: str) -> None:
    """Has the kernels of ``backend`` checked anew when they are next used, on all GPUs here."""
    for gpu in range(torch.cuda.device_count()):
        for kernel in [k for k in known(gpu) if k.backend == backend]:
            del _known[gpu][kernel]
            record.remove(record.identity(gpu), kernel)


def _index(gpu: int | None) -> int | None:
    """The number of the GPU; None where torch sees none, as for fake tensors and in a forked
    worker."""
    if not torch.cuda.is_available() or torch.cuda._is_in_bad_fork():
        return None
    index = torch.cuda.current_device() if gpu is None else gpu
    return index if index < torch.cuda.device_count() else None


def _untimely() -> bool:
    """Whether a check would disturb the caller, or is not meant: while a graph is traced or
    captured, beneath modes and transforms, whose tensors may be no tensors, and in a worker that
    loads data."""
    try:
        device_context = torch.utils._device.DeviceContext
        modes = torch.overrides._get_current_function_mode_stack()
        return (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(not isinstance(mode, device_context) for mode in modes)
            or torch._C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or torch.utils.data.get_worker_info() is not None
            or _capturing()
            or _waiting_is_reported()
        )
    except AttributeError:  # not all of these are public
        return True


def _waiting_is_reported() -> bool:
    """Whether torch warns of what waits for the GPU, as the check does, or raises."""
    return torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode() != 0


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _in_a_thread(kernel: Kernel, gpu: int) -> Outcome | None:
    """What came of the kernel's problem; None where it could not be tried."""
    found: list[Outcome] = []

    def work() -> None:
        _busy.add(threading.get_ident())
        try:
            found.append(_run(kernel, gpu))
        except Exception:  # there is no memory, or no stream: it says nothing about the kernel
            pass
        finally:
            _busy.discard(threading.get_ident())

    caller = threading.get_ident()
    _busy.add(caller)
    try:
        thread = threading.Thread(target=work, name="fastattn self-check", daemon=True)
        thread.start()
        thread.join()
    except RuntimeError:  # no thread can be started, as at the interpreter's exit
        return None
    finally:
        _busy.discard(caller)
    return found[0] if found else None


def _run(kernel: Kernel, gpu: int) -> Outcome:
    """Solves the kernel's problem on the GPU."""
    case = Case(getattr(torch, kernel.dtype), kernel.head_dim or 64, is_causal=True, heads=2)
    with _at(kernel.backend, gpu) as at:
        return families.check(kernel.family, at, [case], first_use=True)


@contextlib.contextmanager
def _at(backend: str, gpu: int) -> Iterator[Device]:
    """The GPU, with a stream of its own for this thread."""
    device = torch.device("cuda", gpu)
    # One for all checks: libraries keep a workspace for every stream that they see.
    stream = _streams.get(gpu) or _streams.setdefault(gpu, torch.cuda.Stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield Device(backend, device)
