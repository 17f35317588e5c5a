"""How kernels are started, and the arithmetic of grids: Triton's own takes 2 us a call."""

from __future__ import annotations

import torch


def launch(kernel, grid: tuple[int, ...], *args: object, device: torch.device, **options) -> None:
    """``kernel[grid](*args, **options)`` on ``device``; an empty grid is no launch."""
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
