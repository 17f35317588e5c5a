"""The arrows of DESIGN.md point one way."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastattn"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(p for end in ("h", "cpp", "cu", "cuh") for p in (ROOT / "csrc").rglob(f"*.{end}"))
BESIDE = [
    ROOT / "setup.py",
    *sorted(
        p
        for folder in ("tests", "benchmarks", "examples")
        for end in ("py", "h", "cpp", "cu")
        for p in (ROOT / folder).rglob(f"*.{end}")
    ),
]

# layer -> the layers of fastattn that it may import; "" is the package itself
ALLOWED = {
    "_extension": {"_C"},
    "_call": set(),
    "reference": {"_call", "reference"},
    "testing": {"testing"},
    "verification": {"_extension", "ops", "reference", "verification", ""},  # "" is the version
    "_problem": set(),
    "_products": {"_extension"},
    "_support": {"_extension", "_problem", "ops"},
    "backends": {"_extension", "_problem", "_products", "_support", "ops", "verification"},
    "ops": {"_call", "_extension", "ops"},
    "functional": {"_problem", "_products", "ops", "reference", "backends", "functional"},
    "nn": {"backends", "functional", "nn"},
    "integrations": {"_products", "nn", "functional", "backends", "integrations"},
    "training": {
        "_products",
        "backends",
        "functional",
        "integrations",
        "nn",
        "ops",
        "training",
    },
    "cli": {
        "integrations",
        "training",
        "functional",
        "backends",
        "verification",
        "ops",
        "_extension",
        "cli",
        "",
    },
    "__main__": {"cli"},
    "__init__": {"backends", "functional", "integrations", "nn", "training"},  # three for mypy
}
# Other packages: torch, Triton for its kernels, any in the command line.
THIRD_PARTY = {
    "ops": {"triton"},
    "integrations": {"accelerate", "transformers", "rich"},
    "cli": None,
}

# csrc layer -> the layers whose headers it may include
INCLUDES = {
    "common": {"common"},
    "cpu": {"common", "cpu"},
    "cuda": {"common", "cuda"},
    "": {"common", "cpu"},
}
# within csrc/cuda: who stands on whom; the emulator is the one other home of ptx's functions
STRATA = {
    "ptx": {"ptx", "emulator"},
    "emulator": {"emulator"},
    "tile": {"tile", "ptx"},
    "kernels": {"kernels", "tile", "ptx"},
    "launch": {"launch", "kernels", "tile"},
    "cuda": {"launch"},
}
TORCH_HOMES = re.compile(r"register_\w+\.(cpp|h)|validate_\w+\.h|check\.h|views\.h")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of the modules that a file of ``package`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            # `from fastattn import nn` imports a layer, `from fastattn.nn import MLP` a name.
            found.update(
                f"{base}.{alias.name}" if base == "fastattn" else base for alias in node.names
            )
    return found


def layers(modules: set[str]) -> set[str]:
    inside = (m.split(".") for m in modules if m.split(".")[0] == "fastattn")
    names = {parts[1] if len(parts) > 1 else "" for parts in inside}
    return {"" if name.startswith("__") else name for name in names}


def test_the_walker_sees_every_form_of_import():
    source = (
        "from . import a\nfrom ..nn import b\nimport fastattn.cli.main\nfrom fastattn import ops"
    )
    found = imported_modules(f"{source}\ndef f():\n  import torch.nn", "fastattn.functional")
    expected = {"fastattn.functional", "fastattn.nn", "fastattn.cli.main", "fastattn.ops"}
    assert found == {*expected, "torch.nn"}
    assert layers(found) == {"functional", "nn", "cli", "ops"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_python_imports(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    package = ".".join(path.relative_to(ROOT).parent.parts)
    modules = imported_modules(path.read_text(), package)
    assert layers(modules) <= ALLOWED[layer]
    others = {m.split(".")[0] for m in modules} - {"fastattn", "torch"}
    allowed = THIRD_PARTY.get(layer, set())
    if allowed is not None:
        assert others - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_includes(path):
    included = re.findall(r'#\s*include\s*["<]([^">]+)[">]', path.read_text())
    outside = [i for i in included if i.startswith(("torch/", "ATen/", "c10/"))]
    assert not outside or TORCH_HOMES.fullmatch(path.name), f"torch headers: {outside}"
    unstable = [i for i in outside if not i.startswith(("torch/csrc/stable/", "torch/headeronly/"))]
    assert set(unstable) <= {"torch/csrc/inductor/aoti_torch/c/shim.h"}, "stable ABI only"
    assert not any(i.startswith("pybind11/") for i in included) or path.name == "module.cpp"
    layer = path.relative_to(ROOT / "csrc").parts[0] if path.parent.name != "csrc" else ""
    ours = {i.split("/")[0] for i in included if (ROOT / "csrc" / i).exists()}
    assert ours <= INCLUDES[layer]
    if layer == "cuda":
        strata = {i.split("/")[1] for i in included if i.startswith("cuda/")}
        assert strata <= STRATA[path.parent.name]
        assert "asm" not in path.read_text() or path.parent.name == "ptx", "asm lives in ptx"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_kernels_include_by_full_path(path):
    """`#include "pack.h"` would escape the walk above."""
    local = re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
    assert all((ROOT / "csrc" / i).exists() for i in local)


@pytest.mark.parametrize("path", [*SOURCES, *MODULES, *BESIDE], ids=name_of)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 400
