"""The check for a GPU machine, without one: with a fault in each rehearsal the verdict is red,
the culprit is named, and every other stage delivers its rows in its box."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gpu import evidence as evidence_module
from gpu.cases import FAMILIES, PROFILES
from gpu.check import Check
from gpu.evidence import TABLES, TEXTS, Evidence
from gpu.plan import BOXES, ROOT, SPEED, TRITON_SPEED
from gpu.processes import Child, watch
from gpu.rehearsal import FAULTS, STAGES, rehearse, stand_in_plan
from gpu.smoke import KERNELS, cases_of, judge
from gpu.summary import summary

CHECK = ROOT / "benchmarks/gpu_check.py"


@pytest.fixture(scope="module")
def fault_free(tmp_path_factory):
    return rehearse("nothing", tmp_path_factory.mktemp("check"))


def test_without_a_fault_it_is_green(fault_free):
    assert not fault_free.wrong
    assert fault_free.page.endswith("Verdict: GREEN")
    for stage in STAGES:
        assert fault_free.spent[stage] <= BOXES[stage]


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "nothing"])
def test_a_fault_is_named_and_the_other_stages_deliver(tmp_path, fault, fault_free):
    rehearsal = rehearse(fault, tmp_path)
    assert not rehearsal.wrong
    _, culprits, silent = FAULTS[fault]
    assert rehearsal.page.endswith("Verdict: RED")
    assert any(culprits[0] in line for line in rehearsal.page.splitlines() if "RED:" in line)
    # What has nothing to do with the fault is as without it.
    before = {(s, r["kernel"], r["case"]) for s, r in fault_free.evidence.rows if s == "smoke"}
    after = {(s, r["kernel"], r["case"]) for s, r in rehearsal.evidence.rows if s == "smoke"}
    if "smoke" not in silent:
        assert {row for row in before if row[1] not in culprits} <= after
    assert len(rehearsal.evidence.of_stage("Triton speed")) == len(
        fault_free.evidence.of_stage("Triton speed")
    )
    if fault == "a wrong result":  # the kernel is not timed, its peer is
        rows = [row for row in rehearsal.evidence.of_stage("speed") if "MLP step" in row["case"]]
        ours = [row for row in rows if row["implementation"] == "cuda"]
        assert ours
        assert all(not row["ms"] and "mlp_forward failed" in row["note"] for row in ours)
        assert any(row["ms"] for row in rows if row["implementation"] == "eager")


def test_at_most_six_small_files(fault_free):
    assert len(TABLES) + len(TEXTS) == 6
    files = list(fault_free.evidence.output.iterdir())
    assert {file.name for file in files} <= {*TABLES, *TEXTS}
    assert 6 * evidence_module.MOST_BYTES < 2_000_000


def test_a_long_log_is_cut(tmp_path):
    evidence = Evidence(tmp_path)
    for _ in range(4):
        evidence.text("tests.txt", "x" * 100_000)
    text = (tmp_path / "tests.txt").read_text()
    assert len(text) < evidence_module.MOST_BYTES + 100
    assert text.endswith("[cut off here]\n")


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK), *arguments], capture_output=True, text=True, timeout=120,
        check=False, **options,
    )  # fmt: skip


def test_a_machine_without_a_gpu_is_refused_in_one_line(tmp_path):
    output = tmp_path / "new"
    done = run("--output", str(output))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu-check: torch sees no GPU")
    assert not done.stdout
    assert not list(output.iterdir()), "nothing is half written"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("wrong:machine", "compute capability 8.0 is not 9.0"),
        ("missing:torch", "do not start (exit status 1): ImportError: libtorch_cuda.so"),
    ],
)
def test_a_machine_that_cannot_be_checked_is_refused_in_one_line(tmp_path, fault, reason):
    why = Check(stand_in_plan(fault), Evidence(tmp_path), 60.0).refused()
    assert reason in why
    assert "\n" not in why
    assert not list(tmp_path.iterdir())


def test_other_gpus_are_checked_for_triton_alone(tmp_path):
    plan = dataclasses.replace(stand_in_plan("wrong:machine"), triton_only=True)
    check = Check(plan, Evidence(tmp_path), 60.0)
    assert check.refused() is None
    assert check.run()
    assert set(check.spent) == {"environment", "Triton tests", "Triton speed"}


def test_a_folder_without_libraries_is_refused(tmp_path):
    done = run("--output", str(tmp_path / "new"), "--libraries", str(tmp_path))
    assert done.returncode == 2
    assert "--libraries: expected a folder with _cuda.so" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("path", "reason"), [("/dev/null/x", "is not writable"), ("/dev/full", "is not writable")]
)
def test_an_output_that_cannot_be_written_is_refused(path, reason):
    done = run("--output", path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    def full(_):
        raise OSError(evidence_module.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evidence_module.os, "fsync", full)
    assert "is full: No space left on device" in Evidence.refuse(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_later_turns_the_verdict_red(tmp_path):
    evidence = Evidence(tmp_path / "gone")
    evidence.row("smoke.csv", "smoke", kernel="k")
    assert evidence.of_stage("smoke")
    assert "smoke.csv: cannot be written" in str(evidence.red[0])


def child(program: str, seconds: float = 20.0) -> Child:
    return Child("child", [sys.executable, "-u", "-c", program], {}, Path("/"), seconds)


def test_a_small_step_has_its_ratio(tmp_path):
    """Of the times: 39 MFLOP in half a millisecond are 0.0 TFLOP/s."""
    evidence = Evidence(tmp_path)
    for name, ms, speed in (("cuda", 0.35, "0.112"), ("eager", 0.6, "0.065"), ("x", 0.0001, "")):
        row = {"case": "step", "pass": "step", "implementation": name, "ms": ms, "TFLOP/s": speed}
        evidence.row("speed.csv", "speed", **row if speed else {**row, "ms": ""})
    page = summary({"gpu": "g", "versions": "v", "ceilings": {}}, {}, evidence)
    assert "| step | step | 0.112 |  | 0.065 (eager) | 1.71x |  |" in page


def test_a_kernel_that_fails_a_timing_is_left_out_behind_it(tmp_path):
    check = Check(stand_in_plan(""), Evidence(tmp_path), 60.0)
    case = FAMILIES["attention backward"][0]
    check._leave_out("flash, attention backward", case.name)
    assert not check.failed
    check._leave_out("cuda, attention backward", case.name)
    assert "attention_backward128" in check.failed


def test_what_failed_runs_again_in_the_case_where_it_failed(tmp_path):
    check = Check(stand_in_plan(""), Evidence(tmp_path), 60.0)
    assert check._smoke_again("linear_split")[-1] == cases_of("linear_split")[0].name
    check._bad_case["linear_split"] = "deep dW"
    assert check._smoke_again("linear_split")[-2:] == ["--only", "deep dW"]


def test_a_program_that_hangs_is_killed_with_what_it_started():
    running = child(
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid)\n"
        "time.sleep(600)\n",
        seconds=4.0,
    )
    lines = []
    watch([running], float("inf"), lambda _, line: lines.append(line))
    assert running.status == "no end after 4 s"
    grandchild, until = Path(f"/proc/{lines[0]}/stat"), time.monotonic() + 10.0
    while grandchild.exists() and ") Z " not in grandchild.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_lines_before_a_crash_are_kept():
    running = child("import os\nprint('one')\nprint('two')\nos.abort()")
    watch([running], float("inf"), lambda *_: None)
    assert running.lines[:2] == ["one", "two"]
    assert running.status == "ended by SIGABRT"


def test_the_stage_ends_what_runs_too_long():
    running = child("import time; time.sleep(600)")
    watch([running], time.monotonic() + 1.0, lambda *_: None)
    assert running.status.startswith("cut off")


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_zeros_are_wrong_at_every_scale(scale):
    expected = scale * np.random.default_rng(0).standard_normal((100, 64))
    assert judge(expected * (1 + 2e-3), expected, "bfloat16").passed
    assert not judge(np.zeros_like(expected), expected, "bfloat16").passed


def test_a_single_wrong_row_is_seen_and_shown():
    expected = np.random.default_rng(0).standard_normal((4, 2048, 128))
    actual = expected.copy()
    actual[2, 64 * 7 + 9] = 0.0
    verdict = judge(actual, expected, "bfloat16")
    assert not verdict.passed
    rows = verdict.map.split("/")
    assert rows[1] != "........"
    assert [row for n, row in enumerate(rows) if n != 1] == ["........"] * 7


def test_nan_is_wrong_and_equal_infinities_are_right():
    expected = np.array([1.0, 2.0, -np.inf])
    assert judge(expected.copy(), expected, "bfloat16").passed
    assert not judge(np.array([1.0, np.nan, -np.inf]), expected, "bfloat16").passed
    assert not judge(np.array([1.0, 2.0, 3.0]), expected, "bfloat16").passed


def test_the_plan_names_what_there_is():
    assert sum(BOXES[stage] for stage in STAGES) < 600
    stands_on = {kernel for cases in FAMILIES.values() for c in cases for kernel in c.stands_on}
    assert stands_on <= set(KERNELS)
    assert {f for _, families in [*SPEED, *TRITON_SPEED] for f in families} == set(FAMILIES)
    assert set(PROFILES) <= set(KERNELS)
    for name in KERNELS:
        names = [case.name for case in cases_of(name)]
        assert names
        assert len(set(names)) == len(names), "a case is named when it hangs"
