"""Whether the GPU still answers in this process."""

from __future__ import annotations

import sys


def is_lost() -> bool:
    """Whether an error stays with the process, as after an illegal access: nothing works then."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
