"""Builds the native library with ninja; the install goes on without it when that cannot be done.

Products, in the package directory:
  _ops.so           op registrations and kernels on LibTorch's stable ABI, no Python symbols
  _C.<suffix>       pybind11 module: build facts, CPU features
  _build_info.json  what was built, or why not and what to do

FASTATTN_SKIP_NATIVE=1 leaves the native library out, FASTATTN_REQUIRE_NATIVE=1 makes its failure
an error.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = (
    "0x020b000000000000"  # 2.11: the library serves this torch and every later one
)

COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# NaN and infinity must hold, so not -ffast-math.
KERNEL = [
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
]
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "generic": [],
}


class NativeBuildError(Exception):
    """The native library cannot be built; args are the reason and what to do."""


def isas() -> list[str]:
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


def torch_paths() -> tuple[list[str], str]:
    try:
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths
    except ImportError as error:
        raise NativeBuildError(
            f"torch is not importable in the build environment ({error})",
            "install torch>=2.11, then reinstall with --no-build-isolation",
        ) from error
    return include_paths(), TORCH_LIB_PATH


def ninja_program() -> list[str]:
    if shutil.which("ninja"):
        return ["ninja"]
    try:
        import ninja
    except ImportError as error:
        raise NativeBuildError("ninja is not installed", "pip install ninja, reinstall") from error
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def write_ninja(build_dir: Path, cxx: str) -> dict[str, Path]:
    """Write build.ninja; returns product file name -> built file."""
    import pybind11

    torch_includes, torch_lib = torch_paths()
    macros = [f"-DFASTATTN_HAVE_{isa.upper()}" for isa in isas()]
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    torch_flags += [f"-isystem{path}" for path in torch_includes]
    python_flags = [
        f"-isystem{sysconfig.get_paths()['include']}",
        f"-isystem{pybind11.get_include()}",
    ]
    lines = [
        f"cxx = {cxx}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -o $out $in $flags",
        "",
    ]

    def compile_(source: str, flags: list[str]) -> str:
        target = f"{Path(source).stem}.o"
        flags = [*COMMON, f"-I{ROOT / 'csrc'}", *flags]
        lines.extend(
            [f"build {target}: compile {ROOT / 'csrc' / source}", f"  flags = {' '.join(flags)}"]
        )
        return target

    features = compile_("cpu/cpu_features.cpp", macros)
    objects = [
        features,
        compile_("cpu/dispatch.cpp", macros),
        compile_("ops.cpp", torch_flags),
        compile_("cpu/register_cpu.cpp", torch_flags),
        *(compile_(f"cpu/isa_{isa}.cpp", [*KERNEL, *ISA_FLAGS[isa]]) for isa in isas()),
    ]
    module = compile_("module.cpp", python_flags)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    undefined = ["-undefined dynamic_lookup"] if sys.platform == "darwin" else []
    lines += [
        f"build _ops.so: link {' '.join(objects)}",
        f"  flags = -L{torch_lib} -ltorch -ltorch_cpu {' '.join(undefined)}",
        f"build _C{suffix}: link {module} {features}",
        f"  flags = {' '.join(undefined)}",
        "",
    ]
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text("\n".join(lines))
    return {name: build_dir / name for name in ("_ops.so", f"_C{suffix}")}


def build_native(build_dir: Path) -> dict[str, Path]:
    if os.environ.get("FASTATTN_SKIP_NATIVE") == "1":
        raise NativeBuildError("FASTATTN_SKIP_NATIVE=1 was set", "unset it and reinstall")
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if cxx is None or not shutil.which(cxx.split()[0]):
        raise NativeBuildError(
            f"no C++ compiler was found (CXX={os.environ.get('CXX', '')!r})",
            "install g++ 11 or later (Debian: apt install g++) or set CXX, then reinstall",
        )
    try:
        products = write_ninja(build_dir, cxx)
    except ImportError as error:
        raise NativeBuildError(f"{error}", "pip install pybind11 ninja, reinstall") from error
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    result = subprocess.run(
        [*ninja_program(), "-C", str(build_dir), *jobs], capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        output = (result.stdout + result.stderr).splitlines()
        errors = [line for line in output if "error" in line.lower()] or output[-3:]
        raise NativeBuildError(
            "the C++ build failed: " + " | ".join(errors[:3]),
            "a compiler with C++20 is needed (g++ 11 or clang 14 and later); set CXX and reinstall",
        )
    return products


class BuildNative(build_ext):
    """Builds everything at once, then puts the products and the build facts into the package."""

    def run(self) -> None:
        package = ROOT / "fastattn" if self.inplace else Path(self.build_lib) / "fastattn"
        package.mkdir(parents=True, exist_ok=True)
        info = {"native": True, "reason": "", "hint": "", "isas": isas()}
        try:
            for name, built in build_native(Path(self.build_temp).resolve() / "native").items():
                # A new file, never a rewrite: another process may have the old one mapped.
                staged = package / f".{name}.new"
                shutil.copy2(built, staged)
                staged.replace(package / name)
        except NativeBuildError as error:
            reason, hint = error.args
            if os.environ.get("FASTATTN_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fastattn: {reason}; {hint}") from error
            print(f"fastattn: native library not built: {reason}; {hint}", file=sys.stderr)
            info.update(native=False, reason=reason, hint=hint, isas=[])
        info["cuda"] = {"built": False, "reason": "this version has no CUDA kernels"}
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return []


setup(
    # Names the wheel after this platform and Python; the build itself is BuildNative's.
    ext_modules=[Extension("fastattn._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
)
