"""The Triton kernels run on a GPU, or on CPU tensors under TRITON_INTERPRET=1; elsewhere their
tests are skipped: `make test` runs them with the interpreter."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops import triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if triton.load_failure() is not None:
        reason = triton.load_failure()
    elif triton.interpreting() or torch.cuda.is_available():
        return
    else:
        reason = "no GPU and no TRITON_INTERPRET=1"
    for item in items:
        if item.get_closest_marker("triton"):  # the folder is a keyword too
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if triton.interpreting() else "cuda")


@pytest.fixture(autouse=True, scope="session")
def _quick_interpreter():
    """The interpreter replaces all of triton.language at each call of a device function again;
    the kernel's own call has done it."""
    if not triton.interpreting():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    patched: set = set()
    patch = pytest.MonkeyPatch()
    first_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if module.startswith("fastattn") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return first_call(self, *args, **kwargs)

    patch.setattr(InterpretedFunction, "__call__", call)
    yield
    patch.undo()
