"""Kernels compiled and never run, for GPUs that need not be here.

As a script it fills Triton's cache with the kernels of the tests marked first_on_gpu, a process a
core: ``python tests/ops/triton/compile_only.py --architecture 90 --jobs 8``. Sizes do not matter to
the cache, multiples of 16 in strides do, so the shapes are those of test_gpu.py.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

MASKS = ("none", "causal", "bool", "float")
HEAD_DIMS = (64, 128)


class Driver:
    """Triton's driver of a GPU that is not here."""

    architecture = 90

    def get_current_device(self) -> int:
        return self.architecture  # the kernels' caches go by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)


def redirect(set_attribute: Callable, architecture: int, launch: Callable) -> None:
    """Launches become calls of ``launch``, the GPU one of ``architecture``."""
    from fastattn.ops.triton import activation, attention_parts, linear_relu, norm, problem

    for module in (problem, linear_relu):
        set_attribute(module, "capability", lambda _: architecture)
    for module in (activation, attention_parts, linear_relu, norm):
        set_attribute(module, "launch", launch)


def _compile(architecture: int, dtype: torch.dtype, head_dim: int, mask: str, order: int) -> int:
    """The kernels of one test; returns how many."""
    from triton.runtime import driver

    from fastattn import ops
    from fastattn.ops.triton import attention, attention_second_order

    fake, count = Driver(), 0
    fake.architecture = architecture
    driver.set_active(fake)

    def launch(kernel, grid, *args, device, **options):
        nonlocal count
        kernel.warmup(*args, grid=grid, **options)
        count += 1

    redirect(setattr, architecture, launch)
    q, k = torch.empty(2, 4, 1000, head_dim, dtype=dtype), torch.empty(2, 4, 1111, head_dim)
    k, lse = k.to(dtype), torch.empty(2, 4, 1000)
    attn_mask = {
        "bool": torch.empty(2, 1, 1000, 1111, dtype=torch.bool),
        "float": torch.empty(1, 4, 1000, 1111, dtype=dtype),
    }.get(mask)
    bias = attn_mask if mask == "float" else None
    more = ops.Options(mask == "causal", 0.1)
    given = (q, k, k, attn_mask, *ops.Extras())
    needs = [True] * (order + 2) + [bias is not None]
    if order == 1:
        attention.attention_forward(*given, *more)
        attention.attention_backward(q, None, *given, q, lse, lse, *more, needs)
    else:
        attention_second_order.attention_double_backward(
            q, None, *given, q, k, k, bias, q, lse, lse, *more, needs
        )
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--jobs", type=int, default=8)
    options = parser.parse_args()
    start = time.monotonic()
    cases = [
        (options.architecture, getattr(torch, options.dtype), head_dim, mask, order)
        for order, head_dim, mask in itertools.product((1, 2), HEAD_DIMS, MASKS)
        if (order, mask) != (2, "bool")
    ]
    with ProcessPoolExecutor(options.jobs) as pool:
        kernels = sum(pool.map(_compile, *zip(*cases, strict=True)))
    print(f"{kernels} launches compiled in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
