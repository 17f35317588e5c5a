"""fastattn in other people's code: models of torch.nn, torch's SDPA, torch.compile, Hugging Face
transformers. The rest of the package knows nothing of them."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("compiler", "sdpa", "torch_nn", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
