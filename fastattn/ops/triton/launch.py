"""How kernels are started."""

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
