"""Collects what travels to a GPU machine: ``make gpu-bundle``.

Into ``--output``: _ops.so and _cuda.so as they are in the package, the builds of the CUDA library
whose waits name themselves (_cuda_watchdog.so) and whose tiles can be chosen (_cuda_tune.so), and
_build_info.json. FASTATTN_LIBRARIES, or gpu_check.py by itself, loads them from there; no Python
module is among them, so any version of Python can. ``--restricted`` builds only what the CUDA
kernels need, from nothing, for a machine where a bundle does not load.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 40_000_000
VARIANTS = ("watchdog", "tune")


class BundleError(Exception):
    """The bundle cannot be made; the text says why, and what to do."""


def load_setup() -> ModuleType:
    """setup.py, which knows how to build; nothing of it runs."""
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(package: Path, folder: Path) -> dict:
    """Copies the libraries of a built package; returns the build facts."""
    try:
        facts = json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError) as error:
        raise BundleError(f"nothing is built in {package}: run make setup first") from error
    for name, part in (("_ops.so", facts), ("_cuda.so", facts.get("cuda", {}))):
        if not part.get("native", part.get("built")) or not (package / name).exists():
            why = "; ".join(filter(None, (part.get("reason"), part.get("hint"))))
            raise BundleError(f"{name} was not built: {why or 'run make setup first'}")
        shutil.copy2(package / name, folder / name)
    return facts


def bundle(folder: Path, setup: ModuleType) -> dict:
    """The whole of it. The variants are built beside the package's own build, incrementally."""
    facts = collect(ROOT / "fastattn", folder)
    build = ROOT / "build" / (sysconfig.get_config_var("SOABI") or "native")
    for variant in VARIANTS:
        facts["cuda"][variant] = setup.build_cuda(build / f"cuda_{variant}", variant)
        shutil.copy2(build / f"cuda_{variant}" / "_cuda.so", folder / f"_cuda_{variant}.so")
    return facts


def restricted(folder: Path, setup: ModuleType) -> dict:
    """_ops.so with one kernel set for the CPU, and _cuda.so, side by side."""
    build = folder / "build"
    with ThreadPoolExecutor() as pool:
        native = pool.submit(setup.build_native, build / "native", True)
        cuda = pool.submit(setup.build_cuda, build / "cuda")
        isas, facts = native.result(), cuda.result()
    shutil.copy2(build / "native/_ops.so", folder / "_ops.so")
    shutil.copy2(build / "cuda/_cuda.so", folder / "_cuda.so")
    shutil.rmtree(build)
    nothing = {"reason": "", "hint": ""}
    return {"native": True, **nothing, "isas": isas, "cuda": {"built": True, **nothing, **facts}}


def make(output: Path, setup: ModuleType, least: bool = False) -> Path:
    """Builds in a folder beside ``output`` that takes its place when all is there."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise BundleError(f"--output: cannot write beside {output}: {error.strerror}") from error
    try:
        facts = (restricted if least else bundle)(folder, setup)
        (folder / "_build_info.json").write_text(json.dumps(facts, indent=2) + "\n")
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > MOST_BYTES:
            raise BundleError(f"the bundle has {size / 1e6:.0f} MB, more than 40 can travel")
        shutil.rmtree(output, ignore_errors=True)
        folder.chmod(0o755)
        folder.rename(output)
    except OSError as error:
        raise BundleError(f"--output: {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-bundle")
    parser.add_argument("--restricted", action="store_true")
    options = parser.parse_args()
    setup = load_setup()
    try:
        folder = make(options.output.resolve(), setup, options.restricted)
    except (BundleError, setup.NativeBuildError) as error:
        print(f"gpu-bundle: {'; '.join(map(str, error.args))}", file=sys.stderr)
        return 1
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.2f} MB  {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
