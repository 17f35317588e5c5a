"""The C++ kernels under the compiler's sanitizers: ``make sanitize``.

1. _ops.so is built with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize/address:
   all of the CPU's C++, with setup.py's sources and flags, for every instruction set that this
   processor runs. The package's own libraries stay as they are.
2. The kernel tests of tests/ops run on it, on each of these instruction sets.
3. 10,000 random problems of tests/fuzz run on it, on each of these instruction sets.
4. kernels.cpp calls every kernel without torch on three threads: under the same two sanitizers,
   and for one instruction set under ThreadSanitizer, from objects in build/sanitize/thread.
5. kernels.cpp's faults, one per sanitizer, must be reported: where one is not, the above says
   nothing.

Needs g++ (CXX) with its sanitizer libraries and what `make setup` leaves. ``--isas``, ``--steps``
and ``--problems`` choose among the above.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
DRIVER = Path(__file__).with_name("kernels.cpp")
CAMPAIGN = ROOT / "tests" / "fuzz" / "campaign.py"
STEPS = ("faults", "kernels", "tests", "fuzz")

LINES = ["-g1", "-fno-omit-frame-pointer"]  # which a report names
# Builds in folders of these names.
FLAGS = {
    "address": [*LINES, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": [*LINES, "-fsanitize=thread"],
}
# Python leaks on purpose, and tests ask for more memory than there is. The exit statuses are ones
# that no test run has.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=98",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=97",
}
# Loaded before Python: the first catches every allocation, and its hook for exceptions needs the
# last.
PRELOADED = ("libasan.so", "libubsan.so", "libstdc++.so")

TESTS = (
    "ops/test_attention_kernels.py",
    "ops/test_linear_kernels.py",
    "ops/test_linear_sizes_of_zero.py",
    "ops/test_layer_kernels.py",
    "ops/test_norm_kernels.py",
    "ops/test_second_order_kernels.py",
    "ops/test_extreme_scores.py",
    "ops/test_extreme_gradients.py",
    "ops/test_error_policy.py",
    "ops/test_training_kernels.py",
    "functional/test_varlen.py",
)
# Slow ones, as in tests/ops/test_isa.py, and one that measures memory, of which a sanitizer takes
# much.
LEFT_OUT = ("130x513", "400x270", "257x300", "test_scratch_does_not_grow")
# A fault of kernels.cpp -> the build that reports it, and what the report says.
FAULTS = {
    "past_the_end": ("address", r"AddressSanitizer: [\w-]+ on address"),
    "misaligned": ("address", r"runtime error: .* misaligned address"),
    "race": ("thread", r"ThreadSanitizer: data race"),
}


class SanitizeError(Exception):
    """A step failed; the text says which and how."""


def load_setup() -> ModuleType:
    """setup.py, which knows how to build; nothing of it runs."""
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Of several -O the last counts; with more these objects take several times as long to compile.
    module.COMMON.append("-O1")
    module.EMULATED_FLAGS["emulated"].append("-O1")
    return module


def runnable_isas(setup: ModuleType, cxx: str) -> list[str]:
    """The kernel sets whose instructions this compiler and this processor have."""
    from fastattn import _extension

    features = set(_extension.cpu_features())
    return [
        isa
        for isa in setup.usable_isas(cxx)
        if {flag.removeprefix("-m") for flag in setup.isa_flags()[isa] if flag.startswith("-m")}
        <= features
    ]


def build(setup: ModuleType, kind: str, isas: list[str], jobs: int) -> None:
    """The kernels' objects, and _ops.so where Python runs it; the program of kernels.cpp."""
    folder = BUILD / kind
    # In the compiler's name the flags hold for compiling and linking alike.
    cxx = f"{setup.compiler()} {shlex.join(FLAGS[kind])}"
    objects = setup.write_ninja(folder, cxx, isas, module=False)
    command = [setup.ninja_program(), "-C", str(folder), "-j", str(jobs), *objects]
    command += ["_ops.so"] if kind == "address" else []
    if subprocess.run(command, check=False).returncode != 0:
        raise SanitizeError(f"the build in {folder} failed")
    facts = {"native": True, "reason": "", "hint": "", "isas": isas, "cuda": {"built": False}}
    (folder / "_build_info.json").write_text(json.dumps(facts) + "\n")
    command = [*shlex.split(cxx), *setup.COMMON, f"-I{setup.CSRC}", str(DRIVER), *objects]
    command += ["-pthread", "-o", "kernels"]
    if subprocess.run(command, cwd=folder, check=False).returncode != 0:
        raise SanitizeError(f"{DRIVER.name} does not compile")


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    return kept | OPTIONS | variables


def run_driver(kind: str, what: str, isa: str) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of GCC 12 does not know addresses as random as a recent Linux makes them.
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
    return subprocess.run(
        [*fixed, str(BUILD / kind / "kernels"), what],
        env=environment(FASTATTN_CPU_ISA=isa),
        capture_output=True,
        text=True,
        check=False,
    )


def expect_fault(name: str, isa: str) -> None:
    """A planted fault is reported, and in a kernel."""
    kind, report = FAULTS[name]
    done = run_driver(kind, name, isa)
    if done.returncode == 0 or not re.search(report, done.stderr):
        raise SanitizeError(f"{name} ({isa}) was not reported:\n{done.stdout}{done.stderr}")
    if not re.search(r"csrc/cpu/\w+\.h", done.stderr):
        raise SanitizeError(f"{name} ({isa}): the report names no kernel:\n{done.stderr}")
    print(f"sanitize: {name} ({isa}) was reported, as it must be", flush=True)


def call_every_kernel(kind: str, isa: str) -> None:
    done = run_driver(kind, "all", isa)
    if done.returncode != 0:
        raise SanitizeError(f"kernels.cpp ({kind}, {isa}):\n{done.stdout}{done.stderr}")
    print(f"sanitize: {kind}: {done.stdout.strip()}", flush=True)


def library(name: str) -> str:
    """The path of one of the compiler's libraries."""
    cxx = shlex.split(load_setup().compiler())
    found = subprocess.check_output([*cxx, f"-print-file-name={name}"], text=True).strip()
    if not Path(found).is_absolute():
        raise SanitizeError(f"{cxx[0]} has no {name}: install the compiler's sanitizer libraries")
    return found


def python_environment(isa: str) -> dict[str, str]:
    # A test's own standard error is the test runner's, so reports go to files.
    log = f":log_path={BUILD / 'address' / 'report'}"
    return environment(
        ASAN_OPTIONS=OPTIONS["ASAN_OPTIONS"] + log,
        UBSAN_OPTIONS=OPTIONS["UBSAN_OPTIONS"] + log,
        LD_PRELOAD=" ".join(map(library, PRELOADED)),
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        FASTATTN_LIBRARIES=str(BUILD / "address"),
        FASTATTN_CPU_ISA=isa,
        FASTATTN_TEST_REQUIRE_NATIVE="1",
    )


def reports() -> str:
    """What was found in Python; warnings of memory that was not to be had are none."""
    texts = [file.read_text() for file in sorted((BUILD / "address").glob("report.*"))]
    return "\n".join(text for text in texts if re.search(r"ERROR: |runtime error: ", text))


# A tensor of 400 floats in memory of 100, as no op can tell.
FAULT_IN_PYTHON = """
import ctypes, torch, fastattn
from fastattn import _extension, ops
assert _extension.HAS_NATIVE, _extension.load_failure()
memory = torch.zeros(100)
lie = (ctypes.c_float * 400).from_address(memory.data_ptr())
x = torch.frombuffer(lie, dtype=torch.float32).view(4, 100)
ops.linear_relu_forward(x, torch.ones(8, 100), None)
"""


def expect_fault_in_python(isa: str) -> None:
    """A fault is reported from within Python as well, where the tests run."""
    command = [sys.executable, "-c", FAULT_IN_PYTHON]
    env = python_environment(isa)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    found = reports()
    clear_reports()
    if done.returncode != 99 or not re.search(
        r"AddressSanitizer: [\w-]+ on address[\s\S]*csrc/cpu/", found
    ):
        raise SanitizeError(f"a fault in Python was not reported:\n{done.stderr}{found}")
    print(f"sanitize: past the end, in Python ({isa}) was reported, as it must be", flush=True)


def clear_reports() -> None:
    for file in (BUILD / "address").glob("report.*"):
        file.unlink()


def run_tests(isa: str, jobs: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(ROOT / "tests" / name) for name in TESTS]
    command += ["-k", " and ".join(f"not {word}" for word in LEFT_OUT)]
    if jobs > 1:
        command += ["-n", str(jobs), "--dist", "worksteal"]
    clear_reports()
    status = subprocess.run(command, cwd=ROOT, env=python_environment(isa), check=False).returncode
    if found := reports():
        raise SanitizeError(f"the tests on {isa} have reports:\n{found}")
    if status != 0:
        raise SanitizeError(f"the tests on {isa} failed with status {status}")


def run_problems(isa: str, problems: int, jobs: int) -> None:
    """Random problems against the oracle, in ``jobs`` processes."""
    clear_reports()
    command = [sys.executable, "-W", "ignore", str(CAMPAIGN), "--seed", "1", "--isa", isa]
    cuts = [problems * n // jobs for n in range(jobs + 1)]
    running = [
        subprocess.Popen(
            [*command, "--numbers", str(first), str(last)],
            env=python_environment(isa),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, last in itertools.pairwise(cuts)
    ]
    outputs = [process.communicate() for process in running]
    if found := reports():
        raise SanitizeError(f"the random problems on {isa} have reports:\n{found}")
    for process, (printed, errors) in zip(running, outputs, strict=True):
        if process.returncode != 0:
            raise SanitizeError(f"the random problems on {isa} died:\n{errors}")
        if failures := json.loads(printed)["failures"]:
            raise SanitizeError(f"random problems on {isa} failed:\n" + "\n".join(failures))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isas", nargs="+", help="kernel sets; by default all that run here")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument(
        "--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    )
    parser.add_argument("--problems", type=int, default=10_000, help="random ones, of each set")
    options = parser.parse_args()
    os.environ["FASTATTN_BUILD_EMULATED"] = "1"
    setup = load_setup()
    start = time.monotonic()

    def done(step: str) -> None:
        print(f"sanitize: {step} after {time.monotonic() - start:.0f} s", flush=True)

    try:
        isas = options.isas or runnable_isas(setup, setup.compiler())
        # Tasks share the same memory in every kernel set: one set shows ThreadSanitizer them all.
        of_kind = {"address": isas, "thread": isas[:1]}
        for kind in FLAGS:
            # Every program has generic beside what it runs: dispatch.cpp falls back to it.
            build(setup, kind, list(dict.fromkeys([*of_kind[kind], "generic"])), options.jobs)
            done(f"{kind}: built for {', '.join(of_kind[kind])}")
        if "faults" in options.steps:
            for name, (kind, _) in FAULTS.items():
                for isa in of_kind[kind]:
                    expect_fault(name, isa)
            for isa in isas:
                expect_fault_in_python(isa)
            done("faults are reported")
        if "kernels" in options.steps:
            for kind in FLAGS:
                for isa in of_kind[kind]:
                    call_every_kernel(kind, isa)
            done("kernels.cpp is clean")
        if "tests" in options.steps:
            for isa in isas:
                run_tests(isa, options.jobs)
                done(f"the tests on {isa} are clean")
        if "fuzz" in options.steps:
            for isa in isas:
                run_problems(isa, options.problems, options.jobs)
                done(f"{options.problems} random problems on {isa} are clean")
    except (SanitizeError, setup.NativeBuildError) as error:
        print(f"sanitize: {'; '.join(map(str, error.args))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
