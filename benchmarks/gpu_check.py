"""Everything for a machine with a GPU in one command: build, GPU tests, timings. `make gpu-check`.

Uses the Python that runs it, with its torch and Triton. Writes build.log, tests.log and what
gpu.py writes into ``--output``; with ``--tune`` times tiles by gpu_tune.py instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
TESTS = [
    "cuda/test_hopper.py",
    "cuda/test_nvcc.py",
    "ops/triton/test_gpu.py",
    "ops/triton/test_triton_attention.py",
    "ops/triton/test_triton_linear.py",
]


def build(output: Path, environment: dict[str, str], seconds: float) -> bool:
    """The native libraries are welcome, but the Triton kernels do without."""
    with (output / "build.log").open("w") as log:
        try:
            result = subprocess.run(
                [sys.executable, *BUILD],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return False
    return result.returncode == 0


def test(output: Path, environment: dict[str, str], seconds: float) -> bool:
    """The GPU tests, dealt out to processes: most of their time is compiling."""
    processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    files = [str(ROOT / "tests" / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    stop, running = time.monotonic() + seconds, []
    for shard in range(processes):
        shards = {"FASTATTN_TEST_SHARD": f"{shard}/{processes}"}
        log = (output / f"tests-{shard}.log").open("w")
        running.append(
            (subprocess.Popen(command, cwd=ROOT, env=environment | shards, stdout=log,
                              stderr=subprocess.STDOUT), log)
        )  # fmt: skip
    good = True
    for process, log in running:
        try:
            good &= process.wait(max(1.0, stop - time.monotonic())) in (0, 5)  # 5: no test
        except subprocess.TimeoutExpired:
            process.kill()
            good = False
        log.close()
    logs = [output / f"tests-{shard}.log" for shard in range(processes)]
    (output / "tests.log").write_text("\n".join(log.read_text() for log in logs))
    for log in logs:
        lines = log.read_text().splitlines()
        print("\n".join(x for x in lines if x.startswith(("FAILED", "ERROR"))) or lines[-1:])
        log.unlink()
    return good


def sanitize(output: Path, environment: dict[str, str], seconds: float) -> bool:
    """The CUDA kernels on small shapes under each of compute-sanitizer's tools."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    paths = [environment.get("PATH", ""), *(f"{home}/bin" for home in homes)]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(paths))
    if program is None:
        print("compute-sanitizer is not there", flush=True)
        return True
    good, stop = True, time.monotonic() + seconds
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable]
        with (output / f"{tool}.log").open("w") as log:
            try:
                result = subprocess.run(
                    [*command, str(ROOT / "tests/cuda/sanitized.py")],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, stop - time.monotonic()),
                )
                passed = result.returncode == 0
            except subprocess.TimeoutExpired:
                passed = False
        print(f"{tool}: {'passed' if passed else 'FAILED'}", flush=True)
        good &= passed
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--tune", action="store_true", help="time tiles instead of cases")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    stop = time.monotonic() + options.seconds
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    environment |= {"FASTATTN_BUILD_TUNE": "1"} if options.tune else {}
    built = build(output, environment, 150)
    print(f"native libraries: {'built' if built else 'not built'}", flush=True)
    tested = test(output, environment, 0.5 * (stop - time.monotonic()))
    print(f"tests: {'passed' if tested else 'FAILED'}", flush=True)
    if not options.tune:
        tested &= sanitize(output, environment, 0.3 * (stop - time.monotonic()))
    program = ROOT / "benchmarks" / ("gpu_tune.py" if options.tune else "gpu.py")
    command = [sys.executable, str(program), "--output", str(output)]
    # The last case that begins may take half a minute.
    command += ["--seconds", f"{max(20, stop - time.monotonic() - 30):.0f}"]
    timed = subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    return 0 if tested and timed else 1


if __name__ == "__main__":
    raise SystemExit(main())
