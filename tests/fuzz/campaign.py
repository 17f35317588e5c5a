"""Random problems, as many as wanted: ``make fuzz N=1000000 SEED=1``.

Problem n of a seed is always the same, so a line of a failure says how to repeat it. The state is
kept in a file after each chunk of problems, and a run that was ended goes on from there. Chunks run
in processes of their own, on each instruction set of this processor in turn; a process that dies is
a failure of the problem that it was at.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import against_oracle
import fuzzed

CHUNK = 2000  # problems of a process, which takes seconds to start
ISAS = ("generic", "avx2", "avx512", "avx512bf16", "emulated")
HERE = Path(__file__).resolve()


@dataclass
class State:
    """What has been run, by classes of problems; the worst error over what is allowed, by dtype and
    magnitude; failures, each with the number that repeats it."""

    seed: int
    chunks: list[int] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, seed: int) -> State:
        if not path.exists():
            return cls(seed)
        kept = json.loads(path.read_text())
        if kept["seed"] != seed:
            raise SystemExit(f"--state: expected a file of seed {seed}, got {kept['seed']}: {path}")
        return cls(**kept | {"classes": Counter(kept["classes"])})

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(vars(self), indent=1, sort_keys=True) + "\n")
        partial.replace(path)

    def add(self, line: dict) -> None:
        """What a process printed for a part of a chunk."""
        self.classes.update(line["classes"])
        for name, error in line["worst"].items():
            self.worst[name] = max(error, self.worst.get(name, 0.0))
        self.failures += line["failures"]


def run_here(seed: int, numbers: Sequence[int], isa: str, at: Path | None = None) -> dict:
    """The problems in this process. ``at``: a file that holds the number of the present one."""
    classes, worst, failures = Counter(), {}, []
    for number in numbers:
        if at is not None:
            at.write_text(str(number))
        problem = fuzzed.draw(seed, number)
        wrong, over = against_oracle.run(problem)
        classes.update([*problem.classes, f"isa: {isa}", "problems"])
        if wrong is not None:
            failures.append(f"--seed {seed} --only {number} --isa {isa}  {problem.op}: {wrong}")
        dtype = str(problem.leaves[0].dtype).removeprefix("torch.")
        name = f"{dtype}, magnitude {problem.magnitude}, order {problem.order}"
        worst[name] = max(over, worst.get(name, 0.0))
    return {"classes": classes, "worst": worst, "failures": failures}


def run_chunk(seed: int, chunk: int, isa: str, count: int) -> Iterator[dict]:
    """The problems of a chunk in processes of their own."""
    yield from run_apart(seed, range(chunk * CHUNK, chunk * CHUNK + count), isa)


def run_apart(seed: int, numbers: range, isa: str) -> Iterator[dict]:
    """The problems in one process. Where it dies, its problem is a failure; the problems before and
    behind that one run again in new processes, because their results died with the process."""
    if not numbers:
        return
    # Threads that wait would take the processor from the other processes.
    threads = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}
    environment = os.environ | threads | {"FASTATTN_CPU_ISA": isa}
    with tempfile.NamedTemporaryFile("r") as at:
        command = [sys.executable, "-W", "ignore", str(HERE), "--seed", str(seed), "--isa", isa]
        command += ["--numbers", str(numbers.start), str(numbers.stop), "--at", at.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        number = int(Path(at.name).read_text() or numbers.start)
    if done.returncode == 0:
        yield json.loads(done.stdout)
        return
    died = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr[-300:]
    failure = f"--seed {seed} --only {number} --isa {isa}  the process died: {died}"
    yield {"classes": {"problems": 1}, "worst": {}, "failures": [failure]}
    yield from run_apart(seed, range(numbers.start, number), isa)
    yield from run_apart(seed, range(number + 1, numbers.stop), isa)


def instruction_sets() -> list[str]:
    """Those that this build has and this processor runs."""
    program = "from fastattn import _extension as e; print(e.load_failure() or e.cpu_isa())"
    found = []
    for isa in ISAS:
        environment = os.environ | {"FASTATTN_CPU_ISA": isa}
        command = [sys.executable, "-c", program]
        said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        found += [isa] if said.strip() == isa else []
    return found


def run(seed: int, total: int, path: Path, workers: int) -> State:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    state, isas = State.load(path, seed), instruction_sets()
    chunks = [c for c in range(math.ceil(total / CHUNK)) if c not in set(state.chunks)]
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[failures]}")
    with Progress(*columns) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task("", total=len(chunks) * CHUNK, failures="0 failures")

        def work(chunk: int) -> tuple[int, list[dict]]:
            count = min(CHUNK, total - chunk * CHUNK)
            return chunk, list(run_chunk(seed, chunk, isas[chunk % len(isas)], count))

        for chunk, lines in pool.map(work, chunks):
            for line in lines:
                state.add(line)
                for failure in line["failures"]:
                    progress.console.print(failure, markup=False, highlight=False)
            if total >= (chunk + 1) * CHUNK:  # one that is cut short is run again
                state.chunks.append(chunk)
                state.save(path)
            progress.update(bar, advance=CHUNK, failures=f"{len(state.failures)} failures")
    return state


def table(state: State) -> str:
    """What has been run, as Markdown."""
    problems = state.classes["problems"]
    lines = [
        f"# {problems:,} random problems of seed {state.seed}: {len(state.failures)} failures",
        "",
        "`make fuzz` wrote this page. A problem has one class or more of most kinds.",
        "",
        *(f"- `{failure}`" for failure in state.failures),
        "| class | problems |",
        "|---|---|",
        *(f"| {name} | {n:,} |" for name, n in sorted(state.classes.items()) if name != "problems"),
        "",
        "The largest error over what is allowed (`against_oracle.py` says what that is):",
        "",
        "| dtype, magnitude of queries and inputs, order of the derivative | error |",
        "|---|---|",
        *(f"| {name} | {over:.2f} |" for name, over in sorted(state.worst.items())),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="what has been run, fuzz-SEED.json")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--only", type=int, help="one problem, whose error is raised")
    parser.add_argument("--isa", default="", help="the instruction set of --only")
    parser.add_argument("--table", type=Path, help="also write what has been run as Markdown")
    parser.add_argument("--numbers", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.isa and os.environ.get("FASTATTN_CPU_ISA") != options.isa:
        environment = os.environ | {"FASTATTN_CPU_ISA": options.isa}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if options.numbers:
        found = run_here(options.seed, range(*options.numbers), options.isa, options.at)
        print(json.dumps(found))
    elif options.only is not None:
        problem = fuzzed.draw(options.seed, options.only)
        print("\n".join(problem.classes))
        print(against_oracle.worst_error(problem))
    else:
        path = options.state or Path(f"fuzz-{options.seed}.json")
        state = run(options.seed, options.problems, path, options.workers)
        if options.table:
            options.table.write_text(table(state))
        print(f"{state.classes['problems']} problems, {len(state.failures)} failures: {path}")
        sys.exit(bool(state.failures))


if __name__ == "__main__":
    main()
