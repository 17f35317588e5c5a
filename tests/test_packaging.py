"""Metadata, the native build and its failures, what wheels and sdists hold.

Builds run in a copy of the tree under a path with a blank, with a compiler that only writes what
it was asked to make: what is tested is the driver, in seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastattn
from fastattn import _extension

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KERNELS = sorted((ROOT / "csrc/cpu/kernels").glob("*.cpp"))

# Takes the C++20 probe of a flag set, unless told otherwise; logs and "compiles" the rest.
COMPILER = """#!/bin/sh
case "$*" in
  *$REFUSE*) echo "error: refused" >&2; exit 1;;
  *-fsyntax-only*) exit 0;;
  *-march=native*) printf "$DEFINED"; exit 0;;
esac
echo "$*" >> "$LOG"
case "$*" in
  *".cu -o"*) echo "$SAY";;
esac
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources, never built, under a path with a blank."""
    target = tmp_path / "a copy"
    junk = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", ".*.new")
    for name in ("csrc", "fastattn"):
        shutil.copytree(ROOT / name, target / name, ignore=junk)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


def setup_py(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTATTN_", "CXX"))}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=tree,
        env={**clean, "FASTATTN_SKIP_CUDA_BUILD": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def build(tree: Path, **env: str) -> dict:
    """Build in place; the build facts that it leaves."""
    done = setup_py(tree, "build_ext", "--inplace", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tree / "fastattn/_build_info.json").read_text())


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_compiler(tree: Path, refuse: str = "no such flag") -> dict[str, str]:
    for module in ("pybind11", "ninja"):
        pytest.importorskip(module)
    script = tree.parent / "c++"
    script.write_text(COMPILER)
    script.chmod(0o755)
    return {"CXX": str(script), "LOG": str(tree.parent / "log"), "REFUSE": refuse}


def fake_nvcc(tree: Path) -> dict[str, str]:
    """As fake_compiler, with the script as nvcc too."""
    env = fake_compiler(tree) | {"FASTATTN_SKIP_CUDA_BUILD": "0"}
    nvcc = tree.parent / "cuda home/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    shutil.copy(env["CXX"], nvcc)
    return env | {"CUDA_HOME": str(tree.parent / "cuda home")}


def test_metadata():
    assert "version" not in PYPROJECT["project"]  # its one home is fastattn/__init__.py
    try:
        assert importlib.metadata.version("fastattn") == fastattn.__version__
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastattn is imported from its tree, not installed")
    scripts = importlib.metadata.entry_points(group="console_scripts", name="fastattn")
    assert callable(next(iter(scripts)).load())


def test_every_direct_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text()
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    needed = [PYPROJECT["project"]["dependencies"], PYPROJECT["build-system"]["requires"], *extras]
    for requirement in (r for group in needed for r in group):
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"^{name}==", pins, re.MULTILINE), name


def test_readme_names_the_variables_that_are_read():
    pattern = re.compile(r"FASTATTN_(?!HAVE_|ISA\b|INLINE|TEST_)[A-Z0-9_]+")
    files = [ROOT / "setup.py", *(ROOT / "fastattn").rglob("*.py")]
    files += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    quoted = {name for p in files for name in re.findall(rf'"({pattern.pattern})"', p.read_text())}
    assert set(pattern.findall((ROOT / "README.md").read_text())) == quoted


@pytest.mark.native
def test_build_facts():
    from fastattn import _C

    assert _extension.build_info["native"]
    assert _C.build_info()["compiler"]
    assert _C.cpu_isa() in _extension.build_info["isas"]
    setup = load_setup()
    assert set(_extension.build_info["isas"]) <= {*setup.ISA_FLAGS, *setup.EMULATED_FLAGS}
    facts = _extension.build_info["cuda"]
    assert facts["built"] == (shutil.which("nvcc") is not None), facts["reason"]


@pytest.mark.native
def test_only_the_stable_abi_is_linked():
    """A C++ symbol of torch would tie the library to one release."""
    if not (nm := shutil.which("nm")) or sys.platform != "linux":
        pytest.skip("needs nm")
    for library in (ROOT / "fastattn").glob("_[oc]*.so"):
        command = [nm, "-D", "--undefined-only", "--demangle", str(library)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "aoti_torch_" in symbols
        assert not re.findall(r"\b(?:at|c10|torch)::.*|\bPy[A-Z_].*|\bcu[A-Z_].*", symbols)


@pytest.mark.native
def test_kernel_sets_share_no_function():
    """The linker keeps one copy of an inline function: its instructions must run everywhere."""
    objects = sorted((ROOT / "build" / sysconfig.get_config_var("SOABI")).glob("cpu_kernels_*.o"))
    if not objects or not (nm := shutil.which("nm")) or sys.platform != "linux":
        pytest.skip("needs nm, and the objects of a build in place")
    for file in objects:
        isa = file.stem.rpartition("_")[2]
        command = [nm, "--defined-only", "--extern-only", "--format=just-symbols", str(file)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        # Data of the C++ runtime, the same for all: where its handler of exceptions is.
        functions = [s for s in symbols if s != "DW.ref.__gxx_personality_v0"]
        assert functions, file.name
        assert all(f"8fastattn3cpu{len(isa)}{isa}" in s for s in functions), file.name


@pytest.mark.native
def test_no_library_names_the_machine_it_was_built_on():
    """Error messages name sources by where they lie in the repository."""
    for library in (ROOT / "fastattn").glob("_*.so"):
        text = library.read_bytes()
        for place in (ROOT, Path(torch.__file__).parents[1]):
            assert f"{place}/".encode() not in text, f"{library.name}: {place}"
        if not library.name.startswith("_C"):
            assert b"include/torch/csrc/stable" in text, "what the check looks for is still there"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/bin/false"}, "cannot compile C++20"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found"),
        ({"PATH": ""}, "no C++ compiler was found"),
        ({"FASTATTN_SKIP_NATIVE": "1"}, "FASTATTN_SKIP_NATIVE=1 was set"),
    ],
    ids=["broken", "missing", "no-path", "skipped"],
)
def test_install_without_a_compiler(tree, env, reason):
    info = build(tree, **env)
    assert not info["native"]
    assert reason in info["reason"]
    assert info["hint"]
    failed = setup_py(tree, "build_ext", "--inplace", FASTATTN_REQUIRE_NATIVE="1", **env)
    assert failed.returncode != 0
    assert reason in failed.stderr


def test_use_without_the_native_library(tree):
    build(tree, CXX="/bin/false")
    program = """if True:
        import warnings, torch, fastattn
        assert fastattn.backends.available() == ["reference"], fastattn.backends.available()
        q = torch.randn(1, 2, 5, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert fastattn.scaled_dot_product_attention(q, q, q).shape == q.shape
        print(caught[0].message)
        print(fastattn.backends.explain("attention", q, q, q))
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "attention: reference" in done.stdout
    assert done.stdout.count("/bin/false cannot compile C++20") == 2


def test_a_failed_build_keeps_the_libraries_of_the_last_one(tree):
    env = fake_compiler(tree)
    built = build(tree, **env)
    libraries = {p.name: p.read_bytes() for p in (tree / "fastattn").glob("*.so")}
    assert "_ops.so" in libraries
    (tree / "csrc/cpu/register_attention.cpp").touch()
    info = build(tree, **{**env, "REFUSE": "-c "})
    assert info["native"]
    assert info["isas"] == built["isas"]
    assert "error: refused" in info["reason"]
    assert {p.name: p.read_bytes() for p in (tree / "fastattn").glob("*.so")} == libraries
    assert not build(tree, **env)["reason"], "the next good build says nothing of it"
    assert not build(tree, **env, FASTATTN_SKIP_NATIVE="1")["native"]
    assert not list((tree / "fastattn").glob("*.so")), "what is left out on purpose goes"


@pytest.mark.parametrize(
    ("defined", "expected"),
    [
        ("AVX2 FMA F16C", {"avx2", "generic"}),
        ("AVX2 FMA F16C AVX512F AVX512BW AVX512DQ AVX512VL", {"avx512", "generic"}),
        (
            "AVX2 FMA F16C AVX512F AVX512BW AVX512DQ AVX512VL AVX512BF16",
            {"avx512", "avx512bf16", "generic"},
        ),
        ("AVX2 FMA", {"generic"}),
    ],
)
def test_the_kernels_of_one_processor(tree, defined, expected):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the kernel sets are x86's")
    macros = "".join(f"#define __{name}__ 1\n" for name in defined.split())
    env = fake_compiler(tree) | {"DEFINED": macros, "FASTATTN_ONLY_THIS_CPU": "1"}
    assert set(build(tree, **env)["isas"]) == expected


def test_a_failed_first_build_leaves_no_library(tree):
    info = build(tree, **{**fake_compiler(tree), "REFUSE": "-c "})
    assert not info["native"]
    assert "error: refused" in info["reason"]
    assert not list((tree / "fastattn").glob("*.so"))


def test_flags(tree):
    """Torch's headers only where they belong, each kernel set under its own flags."""
    env = fake_compiler(tree)
    info = build(tree, **env, MAX_JOBS="1", FASTATTN_BUILD_EMULATED="1")
    lines = Path(env["LOG"]).read_text().splitlines()
    compiled = {re.search(r" -o (\w+)\.o$", line)[1]: line for line in lines if " -c " in line}
    others = {*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")}
    expected = {"_".join(p.relative_to(ROOT / "csrc").with_suffix("").parts) for p in others}
    of_isa = {isa: {f"cpu_kernels_{p.stem}_{isa}" for p in KERNELS} for isa in info["isas"]}
    assert set(compiled) == expected.union(*of_isa.values())
    with_torch = {name for name, line in compiled.items() if "TORCH_TARGET_VERSION" in line}
    assert with_torch == {name for name in expected if name.startswith("cpu_register_")}
    assert not any("-ffast-math" in line for line in lines)
    assert not any("-rpath" in line for line in lines)
    assert all(f"-ffile-prefix-map={tree}=." in line for line in compiled.values())
    setup = load_setup()
    for isa, names in of_isa.items():
        flags = [*(setup.ISA_FLAGS | setup.EMULATED_FLAGS)[isa], f"-DFASTATTN_ISA={isa}"]
        assert all(set(flags) <= set(compiled[name].split()) for name in names)
    without = compiled.keys() - set().union(*(of_isa[isa] for isa in of_isa if isa != "generic"))
    assert not any(" -m" in compiled[name] for name in without)
    assert all(f"-DFASTATTN_HAVE_{isa.upper()}" in compiled["cpu_dispatch"] for isa in of_isa)
    build(tree, **env, FASTATTN_BUILD_EMULATED="1")
    assert Path(env["LOG"]).read_text().splitlines() == lines, "the second build does nothing"


def test_cuda_flags(tree):
    """nvcc compiles the launches alone, for Hopper; the rest of the library is plain C++."""
    env = fake_nvcc(tree)
    info = build(tree, **env)
    assert info["cuda"]["archs"] == ["90a"]
    lines = Path(env["LOG"]).read_text().splitlines()
    compiled = {re.search(r"/([\w.]+\.cu) ", line)[1] for line in lines if ".cu -o" in line}
    assert compiled == {p.name for p in (ROOT / "csrc/cuda/launch").glob("*.cu")}
    assert all("compute_90a,code=sm_90a" in line for line in lines if ".cu -o" in line)
    (link,) = (line for line in lines if "_cuda.so" in line)
    assert "-cudart static" in link
    assert "-rpath" not in link


CUDA_FAILURES = [
    ({"FASTATTN_CUDA_ARCHS": "90a;100"}, "got ['100']"),
    ({"CUDA_HOME": "/nowhere"}, "no nvcc was found in CUDA_HOME=/nowhere"),
    ({"REFUSE": ".cu -o"}, "the CUDA build failed: error: refused"),
]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"FASTATTN_SKIP_CUDA_BUILD": "1"}, "FASTATTN_SKIP_CUDA_BUILD=1 was set"), *CUDA_FAILURES],
    ids=["skipped", "arch", "missing", "error"],
)
def test_without_cuda_the_rest_is_built(tree, change, reason):
    info = build(tree, **{**fake_nvcc(tree), **change})
    assert info["native"]
    assert not info["cuda"]["built"]
    assert reason in info["cuda"]["reason"]
    assert not (tree / "fastattn/_cuda.so").exists()


@pytest.mark.parametrize(("change", "reason"), CUDA_FAILURES, ids=["arch", "missing", "error"])
def test_a_failed_cuda_build_keeps_the_library_of_the_last_one(tree, change, reason):
    env = fake_nvcc(tree)
    assert build(tree, **env)["cuda"]["built"]
    (tree / "csrc/cuda/launch/unsupported.cu").touch()
    facts = build(tree, **{**env, **change})["cuda"]
    assert facts["built"]
    assert facts["archs"] == ["90a"]
    assert reason in facts["reason"]
    assert (tree / "fastattn/_cuda.so").exists()
    build(tree, **{**env, "FASTATTN_SKIP_CUDA_BUILD": "1"})
    assert not (tree / "fastattn/_cuda.so").exists()


def test_nvcc_is_found_in_its_usual_place(monkeypatch, tmp_path):
    """A login shell often has no nvcc on its PATH."""
    setup = load_setup()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("FASTATTN_SKIP_CUDA_BUILD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    looked = []
    monkeypatch.setattr(setup.shutil, "which", lambda name, path=None: looked.append(path) or "x")
    assert setup.cuda_compiler() == "x"
    assert looked == [f"{tmp_path}:/usr/local/cuda/bin"]


def test_what_ptxas_says_is_kept(tree):
    """Also by a build that has nothing to compile."""
    env = {**fake_nvcc(tree), "SAY": "ptxas info : (C7510) Potential Performance Loss: serialized"}
    for _ in range(2):
        launches = len(list((tree / "csrc/cuda/launch").glob("*.cu")))
        assert build(tree, **env)["cuda"]["ptxas"] == {"C7510": launches}


def test_a_compiler_without_avx512_leaves_only_that_out(tree):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("another architecture")
    info = build(tree, **fake_compiler(tree, refuse="-mavx512f"))
    assert info["native"]
    assert info["isas"] == ["avx2", "generic"]


def test_wheel(tree):
    pytest.importorskip("wheel")
    (tree / "fastattn/_C.stale.so").touch()
    done = setup_py(tree, "bdist_wheel", **fake_compiler(tree))
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"fastattn-{fastattn.__version__}-{tag}-{tag}-")
    assert not wheel.name.endswith("-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastattn/py.typed", "fastattn/_ops.so", "fastattn/_build_info.json"} <= names
    assert len([name for name in names if name.startswith("fastattn/_C.")]) == 1
    assert "fastattn/_C.stale.so" not in names
    assert not any(name.startswith(("csrc", "tests", "benchmarks", "build")) for name in names)
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fastattn").rglob("*.py")}
    assert modules <= names


def test_sdist_holds_the_sources(tree):
    done = setup_py(tree, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[ch]*") if p.is_file()}
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "fastattn/py.typed"} <= names
    assert not any(name.endswith(".so") for name in names)
