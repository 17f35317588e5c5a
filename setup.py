"""Builds the native library with ninja; the install goes on without it when that cannot be done.

Products, in the package directory:
  _ops.so           op registrations and kernels on LibTorch's stable ABI, no Python symbols
  _cuda.so          the same for CUDA; loads under any torch and without a GPU
  _C.<suffix>       pybind11 module: build facts, CPU features
  _build_info.json  what was built, or why not and what to do

FASTATTN_SKIP_NATIVE=1 leaves the native library out, FASTATTN_REQUIRE_NATIVE=1 makes its failure an
error, FASTATTN_BUILD_EMULATED=1 adds the kernels that only tests run, FASTATTN_ONLY_THIS_CPU=1
builds only the kernels that this processor runs. The CUDA library is built where nvcc is (in
CUDA_HOME, on the PATH or in /usr/local/cuda), unless FASTATTN_SKIP_CUDA_BUILD=1. CXX names the
compiler, MAX_JOBS bounds the parallel compilations; FASTATTN_CUDA_ARCHS can only be 90a so far.
A build that fails keeps the libraries of an earlier build in place.
"""

import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# 2.11: the library serves this torch and every later one.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"

COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# NaN and infinity must hold, so not -ffast-math.
KERNEL = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
KERNEL += ["-Wno-maybe-uninitialized", "-Wno-psabi"]
# Kernel set -> flags of csrc/cpu/kernels/*.cpp; generic is the baseline of the compiler's target.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
ISA_FLAGS = {
    # For bfloat16 alone: the other dtypes' kernels are avx512's.
    "avx512bf16": [*AVX512, "-mavx512bf16", "-DFASTATTN_ONLY_BF16"],
    "avx512": AVX512,
    "avx2": AVX2,
    "generic": [],
}
# avx512bf16's tiles without its instructions, for tests.
EMULATED_FLAGS = {"emulated": [*AVX2, "-O2", "-DFASTATTN_EMULATED"]}
CUDA_ARCHS = ("90a",)
# Builds of the CUDA library beside the one that is installed (`make gpu-bundle`): waits that name
# themselves when they hang, and the tiles that only benchmarks/gpu/tune.py times.
CUDA_VARIANTS = {"": [], "watchdog": ["-DFASTATTN_WATCHDOG"], "tune": ["-DFASTATTN_TUNE"]}
# ptxas numbers what it has against a kernel (C7508: setmaxnreg is ignored, C7510: matrix products
# are serialised), and calls only some of it a warning.
PTXAS_WARNING = re.compile(r"\((C\d{4})\)|(.*\bwarning\b.*)")


class NativeBuildError(Exception):
    """A library cannot be built; args are the reason and what to do."""


class LeftOut(NativeBuildError):
    """A library is left out on purpose."""


def compiler() -> str:
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if cxx is None or not shutil.which(shlex.split(cxx)[0]):
        raise NativeBuildError(
            f"no C++ compiler was found (CXX={os.environ.get('CXX', '')!r})",
            "install g++ 11 or later (Debian: apt install g++) or set CXX, then reinstall",
        )
    return cxx


def cuda_compiler() -> str:
    if os.environ.get("FASTATTN_SKIP_CUDA_BUILD") == "1":
        raise LeftOut("FASTATTN_SKIP_CUDA_BUILD=1 was set", "unset it and reinstall")
    home = os.environ.get("CUDA_HOME")
    paths = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(paths))
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on the PATH or in /usr/local/cuda/bin"
        raise NativeBuildError(
            f"no nvcc was found {where}", "install the CUDA toolkit 12.5 or later, then reinstall"
        )
    return nvcc


def cuda_archs() -> list[str]:
    archs = os.environ.get("FASTATTN_CUDA_ARCHS", "90a").replace(";", " ").split()
    if unknown := sorted(set(archs) - set(CUDA_ARCHS)):
        raise NativeBuildError(
            f"FASTATTN_CUDA_ARCHS: expected names from {', '.join(CUDA_ARCHS)}, got {unknown}",
            "other GPUs are served by Triton; unset it and reinstall",
        )
    if not archs:
        raise NativeBuildError("FASTATTN_CUDA_ARCHS is empty", "unset it and reinstall")
    return archs


def isa_flags() -> dict[str, list[str]]:
    emulated = os.environ.get("FASTATTN_BUILD_EMULATED") == "1"
    return ISA_FLAGS | (EMULATED_FLAGS if emulated else {})


def of_this_cpu(cxx: str, isas: list[str]) -> list[str]:
    """The kernel sets that run here: the best one's and, as dispatch.cpp needs it, generic. All of
    them where the compiler does not know this processor."""
    command = [*shlex.split(cxx), "-march=native", "-dM", "-E", "-x", "c++", "-"]
    result = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return isas
    defined = set(re.findall(r"#define (__\w+__) ", result.stdout))
    here = [
        isa
        for isa, flags in ISA_FLAGS.items()
        if {f"__{f.removeprefix('-m').upper()}__" for f in flags if f.startswith("-m")} <= defined
    ]
    best = here[:2] if here[0] == "avx512bf16" else here[:1]
    return [isa for isa in isas if isa in (*best, "generic")]


def compile_errors(cxx: str, flags: list[str]) -> str:
    """What the compiler has against a C++20 program under these flags; empty if nothing."""
    command = [*shlex.split(cxx), *COMMON, *flags, "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <version>\ntemplate <class T> concept C = true;\nC auto x = 1;\n"
    result = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return ""
    return result.stderr.strip() or f"exit status {result.returncode}"


def usable_isas(cxx: str) -> list[str]:
    """The kernel sets that this compiler can build for this machine's architecture."""
    if errors := compile_errors(cxx, KERNEL):
        raise NativeBuildError(
            f"{cxx} cannot compile C++20: {' | '.join(errors.splitlines()[:3])}",
            "install g++ 11 or clang 14, or later, or set CXX, then reinstall",
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        isa
        for isa, flags in isa_flags().items()
        if not flags or (x86 and not compile_errors(cxx, flags))
    ]


def torch_paths() -> tuple[list[str], list[str], str]:
    """Torch's header directories, the flags to compile with them, and its library directory."""
    try:
        from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths
    except (ImportError, OSError) as error:
        raise NativeBuildError(
            f"torch is not importable in the build environment ({error})",
            "install torch>=2.11, then reinstall with --no-build-isolation",
        ) from error
    includes = include_paths()
    return includes, [TORCH_TARGET, *(f"-isystem{path}" for path in includes)], TORCH_LIB_PATH


def ninja_program() -> str:
    if found := shutil.which("ninja"):
        return found
    try:
        import ninja
    except ImportError as error:
        raise NativeBuildError("ninja is not installed", "pip install ninja, reinstall") from error
    return str(Path(ninja.BIN_DIR) / "ninja")


def python_includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        reason = "pybind11 is not installed"
        raise NativeBuildError(reason, "pip install pybind11, reinstall") from error
    return [sysconfig.get_paths()["include"], pybind11.get_include()]


def without_paths(*includes: str) -> list[str]:
    """Flags that name sources in error messages without where they lie on the build machine. The
    last that fits holds: torch may be installed below the sources."""
    places = {str(ROOT): ".", **dict.fromkeys(includes, "include")}
    return [f"-ffile-prefix-map={path}={name}" for path, name in places.items()]


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, link: str, **variables: str) -> None:
        self.lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
        self.lines += ["rule link", f"  command = {link} -shared -o $out $in $flags"]
        self.compiler("compile", "$cxx -MMD -MF $out.d $flags -c $in -o $out")

    def compiler(self, rule: str, command: str) -> None:
        """A rule whose command lists in $out.d the files that it has included."""
        self.lines += [f"rule {rule}", f"  command = {command}"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, source: Path, flags: list[str], isa: str = "", rule: str = "compile") -> str:
        parts = [*source.relative_to(CSRC).with_suffix("").parts, *filter(None, [isa])]
        path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        return self.build(f"{'_'.join(parts)}.o", rule, [path], flags)

    def build(self, target: str, rule: str, inputs: list[str], flags: list[str]) -> str:
        escaped = shlex.join(flags).replace("$", "$$")
        self.lines += [f"build {target}: {rule} {' '.join(inputs)}", f"  flags = {escaped}"]
        return target

    def write(self, build_dir: Path) -> None:
        build_dir.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text("\n".join([*self.lines, ""]))


def write_ninja(build_dir: Path, cxx: str, isas: list[str], module: bool = True) -> list[str]:
    """Writes build.ninja; returns the objects without torch: the kernels and their dispatch."""
    torch_includes, torch_flags, torch_lib = torch_paths()
    python = python_includes() if module else []
    common = [*COMMON, *without_paths(*torch_includes, *python), f"-I{CSRC}"]
    ninja = Ninja("$cxx", cxx=cxx)
    without_torch, with_torch = [], []
    for source, isa in itertools.product(sorted(CSRC.glob("cpu/kernels/*.cpp")), isas):
        flags = [*KERNEL, *isa_flags()[isa], f"-DFASTATTN_ISA={isa}"]
        without_torch.append(ninja.compile(source, [*common, *flags], isa))
    for source in sorted(CSRC.glob("cpu/*.cpp")):
        if source.stem.startswith("register_"):
            with_torch.append(ninja.compile(source, [*common, *torch_flags]))
        else:
            flags = [f"-DFASTATTN_HAVE_{isa.upper()}" for isa in isas]
            without_torch.append(ninja.compile(source, [*common, *flags]))
    # Linux finds undefined symbols here and not in the user's first call. No path of the build
    # machine is kept: torch is loaded before the library.
    strict = ["-Wl,--no-undefined"] if sys.platform == "linux" else []
    link = [f"-L{torch_lib}", "-ltorch_cpu", *strict]
    ninja.build("_ops.so", "link", [*without_torch, *with_torch], link)
    if module:
        flags = [*common, *(f"-isystem{path}" for path in python)]
        dynamic = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        objects = [ninja.compile(CSRC / "module.cpp", flags), "cpu_cpu_features.o"]
        ninja.build(MODULE, "link", objects, dynamic)
    ninja.write(build_dir)
    return without_torch


def write_cuda_ninja(build_dir: Path, cxx: str, nvcc: str, variant: str) -> None:
    torch_includes, torch_flags, torch_lib = torch_paths()
    ninja = Ninja("$nvcc -cudart static", cxx=cxx, nvcc=shlex.quote(nvcc))
    # The log of an object stays beside it, also when a later build has nothing to compile.
    logged = "$nvcc -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1"
    ninja.compiler("compile_cuda", f"{logged} || {{ cat $out.log; false; }}")
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()]
    host = [flag for flag in COMMON if not flag.startswith(("-std", "-O"))]
    on_gpu = ["-std=c++20", "-O3", *archs, f"-I{CSRC}", f"-Xcompiler={','.join(host)}"]
    on_gpu += ["-ccbin", shlex.split(cxx)[0], *CUDA_VARIANTS[variant]]
    on_host = [*COMMON, f"-I{CSRC}", *torch_flags, *without_paths(*torch_includes)]
    launches = sorted(CSRC.glob("cuda/launch/*.cu"))
    objects = [ninja.compile(source, on_host) for source in sorted(CSRC.glob("cuda/*.cpp"))]
    objects += [ninja.compile(source, on_gpu, rule="compile_cuda") for source in launches]
    # To the linker alone: nvcc writes its own options into the library.
    link = [f"-Xlinker=-L{torch_lib}", "-Xlinker=-ltorch_cpu", "-ccbin", shlex.split(cxx)[0]]
    link += ["-Xlinker=--no-undefined", "-Xlinker=--exclude-libs=ALL", "-ldl"]
    ninja.build("_cuda.so", "link", objects, link)
    ninja.write(build_dir)


def run_ninja(build_dir: Path, what: str, hint: str) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [ninja_program(), "-C", str(build_dir), *jobs]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    (build_dir / "build.log").write_text(result.stdout + result.stderr)
    if result.returncode != 0:
        output = (result.stdout + result.stderr).splitlines()
        errors = [line for line in output if "error:" in line] or output[-3:]
        raise NativeBuildError(f"the {what} build failed: " + " | ".join(errors[:3]), hint)


def build_native(build_dir: Path, least: bool = False) -> list[str]:
    """Build _ops.so and the module in build_dir; returns the kernel sets that are in. ``least``:
    what the CUDA kernels need beside them, in little time: one kernel set, no module."""
    if os.environ.get("FASTATTN_SKIP_NATIVE") == "1":
        raise LeftOut("FASTATTN_SKIP_NATIVE=1 was set", "unset it and reinstall")
    cxx = compiler()
    isas = ["generic"] if least else usable_isas(cxx)
    if os.environ.get("FASTATTN_ONLY_THIS_CPU") == "1":
        isas = of_this_cpu(cxx, isas)
    write_ninja(build_dir, cxx, isas, module=not least)
    needed = "a compiler with C++20 is needed (g++ 11 or clang 14 and later); set CXX and reinstall"
    run_ninja(build_dir, "C++", needed)
    return isas


def build_cuda(build_dir: Path, variant: str = "") -> dict[str, object]:
    """Build _cuda.so in build_dir; returns the architectures that are in, and how often ptxas has
    what against the kernels. The logs stay beside the objects."""
    if sys.platform != "linux":
        raise NativeBuildError("the CUDA kernels are built on Linux only", "use Triton elsewhere")
    write_cuda_ninja(build_dir, compiler(), cuda_compiler(), variant)
    run_ninja(build_dir, "CUDA", "the CUDA toolkit 12.5 or later is needed; reinstall with it")
    logs = "\n".join(log.read_text() for log in build_dir.glob("*.o.log"))
    warnings = Counter(code or line.strip() for code, line in PTXAS_WARNING.findall(logs))
    return {"archs": cuda_archs(), "ptxas": dict(sorted(warnings.items()))}


def install(build_dir: Path, package: Path, *names: str) -> None:
    for name in names:
        # A new file, never a rewrite: another process may have the old one mapped.
        staged = package / f".{name}.new"
        shutil.copy2(build_dir / name, staged)
        staged.replace(package / name)


def earlier_facts(package: Path) -> dict:
    """The build facts of an earlier build in place; empty where there was none."""
    try:
        return json.loads((package / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


class BuildNative(build_ext):
    """Builds everything at once, then puts the products and the build facts into the package."""

    def run(self) -> None:
        # A build in place, which `pip install -e` is too, keeps its objects: it is incremental.
        tag = sysconfig.get_config_var("SOABI") or "native"
        build_dir = ROOT / "build" / tag if self.inplace else Path(self.build_temp) / "native"
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fastattn"
        package.mkdir(parents=True, exist_ok=True)
        earlier = earlier_facts(package)
        info = self.built(
            package,
            ("_ops.so", MODULE),
            lambda: {"isas": build_native(build_dir.resolve())},
            build_dir,
            earlier if earlier.get("native") else None,
        )
        if info["reason"] and os.environ.get("FASTATTN_REQUIRE_NATIVE") == "1":
            raise SystemExit(f"fastattn: {info['reason']}; {info['hint']}")
        info["native"] = info.pop("built")
        cuda_dir, earlier_cuda = build_dir / "cuda", earlier.get("cuda") or {}
        info["cuda"] = self.built(
            package,
            ("_cuda.so",),
            lambda: self.build_cuda(cuda_dir.resolve(), info),
            cuda_dir,
            earlier_cuda if earlier_cuda.get("built") else None,
        )
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    @staticmethod
    def build_cuda(build_dir: Path, native: dict) -> dict[str, object]:
        if not native["native"]:
            raise LeftOut("the native library was not built", native["hint"])
        return build_cuda(build_dir)

    @staticmethod
    def built(
        package: Path,
        products: tuple[str, ...],
        build: Callable[[], dict[str, object]],
        build_dir: Path,
        earlier: dict | None,
    ) -> dict:
        """Runs ``build`` and installs its products; returns the facts. What an earlier build left
        stays in place where this one fails, and goes where it is left out on purpose."""
        try:
            facts = build()
            install(build_dir, package, *products)
            return {"built": True, "reason": "", "hint": "", **facts}
        except NativeBuildError as error:
            reason, hint = error.args
            print(f"fastattn: {', '.join(products)} not built: {reason}; {hint}", file=sys.stderr)
            there = all((package / name).exists() for name in products)
            if earlier is not None and there and not isinstance(error, LeftOut):
                return {**earlier, "built": True, "reason": reason, "hint": hint}
            for name in products:
                (package / name).unlink(missing_ok=True)
            return {"built": False, "reason": reason, "hint": hint, "isas": [], "archs": []}

    def get_outputs(self) -> list[str]:
        return []


if __name__ == "__main__":
    setup(
        # Names the wheel after this platform and Python; the build itself is BuildNative's.
        ext_modules=[Extension("fastattn._C", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
