"""The arrows of DESIGN.md point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastattn"

# layer -> the layers of fastattn that it may import
ALLOWED = {
    "_extension": set(),
    "reference": set(),
    "backends": {"_extension"},
    "ops": {"_extension", "ops"},
    "functional": {"ops", "reference", "backends", "functional"},
    "nn": {"functional", "nn"},
    "integrations": {"nn", "functional", "backends", "integrations"},
    "cli": {"integrations", "functional", "backends", "_extension", "cli", ""},
    "__main__": {"cli"},
    "__init__": {"backends", "functional"},
}


def imported(path: Path) -> set[str]:
    """The layers of fastattn that a file imports; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "fastattn":
            names = [f"fastattn.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        else:
            continue
        for name in names:
            if name == "fastattn" or name.startswith("fastattn."):
                found.add(([*name.split("."), ""])[1])
    return {"" if name.startswith("__") else name for name in found} - {"_C"}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_python_imports(path):
    parts = path.relative_to(PACKAGE).parts
    layer = parts[0].removesuffix(".py")
    assert imported(path) <= ALLOWED[layer], f"{layer} imports {imported(path) - ALLOWED[layer]}"


SOURCES = sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")])
TORCH = {"ops.cpp", "register_cpu.cpp", "validate.h", "check.h"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_includes(path):
    included = re.findall(r'#include ["<]([^">]+)[">]', path.read_text())
    assert included or path.name == "philox.h" or path.suffix == ".h"
    if any(name.startswith(("torch/", "ATen/", "c10/")) for name in included):
        assert path.name in TORCH
    assert not any(name.startswith(("ATen/", "c10/")) for name in included), "stable ABI only"
    if path.parent.name == "common":
        assert not any(name.startswith(("cpu/", "cuda/")) for name in included)


@pytest.mark.parametrize("path", [*SOURCES, *sorted(PACKAGE.rglob("*.py"))], ids=lambda p: p.name)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
