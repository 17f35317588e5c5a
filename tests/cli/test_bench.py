"""bench end to end on its smallest cases, its gate against wrong results, its files."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import torch
from rich.console import Console

from fastattn.cli import main
from fastattn.cli.bench import cases, measure, report
from fastattn.cli.bench.attention import Attention
from fastattn.cli.bench.case import OURS, Case
from fastattn.verification.shapes import ATTENTION

pytestmark = pytest.mark.native
ROOF = measure.Roofline(1e11, 2e11, 1e10)


def test_bench_writes_a_table_a_page_and_compares(tmp_path, capsys):
    # torch.compile's first call takes too long for a test: the default peers.
    call = ["bench", "--op", "mlp", "--filter", "batch 64", "--seconds", "0.02"]
    assert main.main([*call, "--output", str(tmp_path)]) == 0
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["direction"] for r in rows] == ["forward", "step"]
    for row in rows:
        assert row["peer"] == "eager"
        assert float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
        assert float(row["gflops"]) > 0
        assert float(row["percent_of_roofline"]) > 0
        assert int(row["rounds"]) >= 5
    page = (tmp_path / "bench.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    assert main.main([*call, "--compare", str(tmp_path / "bench.csv")]) == 0
    text = capsys.readouterr().out
    assert "against the earlier run" in text
    assert "measured roofline" in text


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--filter", "no such case"], "no case contains 'no such case'"),
        (["--compare", "/no/such.csv"], "no/such.csv"),
        (["--compare", __file__], "expected a CSV file of fastattn bench"),
    ],
)
def test_arguments_that_make_no_sense(arguments, says, capsys):
    assert main.main(["bench", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["off", "nan"])
def test_a_wrong_result_is_not_timed(wrong):
    case = next(cases.cases(["linear_relu"], "default", False))

    def build():
        runs = case.build()
        (out,) = runs["eager"]()
        bad = out + 0.1 if wrong == "off" else out.clone().fill_(torch.nan)
        return runs | {OURS: lambda: [bad]}

    (result,) = measure.measure(dataclasses.replace(case, build=build), 0.01)
    assert "is off eager's by" in result.error
    assert "wrong result" in report.cells(result)


def test_every_op_of_the_command_line_has_cases():
    assert all(any(case.op for case in cases.cases([op], "default", False)) for op in main.OPS)
    with pytest.raises(KeyError):
        next(cases.cases(["nothing"], "default", False))


def builds_and_agrees(case: Case) -> None:
    """One call of each implementation: what a user would be told is wrong is a bug here."""
    torch.compiler.reset()
    torch.manual_seed(0)
    runs = case.build()
    if case.random:
        for run in runs.values():
            run()
    else:
        error = measure.disagreement(case, runs)
        assert not error, (case.key, error)
    assert case.flops > 0


def test_every_case_builds_and_agrees():
    for case in cases.cases(main.OPS, "default", False):
        # The longer ones differ by their sizes alone; the next test has their kinds.
        if case.op == "attention" and case.seq > 197:
            continue
        if case.op == "second_order" and case.seq > 512:
            continue
        builds_and_agrees(case)


@pytest.mark.parametrize("kind", ["full", "causal", "padding", "bias", "dropout", "window"])
def test_every_kind_of_attention_builds_and_agrees(kind):
    shape = ATTENTION["Llama-like"]._replace(batch=2, seq_q=70, seq_k=70, window_size=(9, -1))
    for dtype in (torch.float32, torch.bfloat16):
        for case in Attention(shape, kind, dtype).cases("default"):
            builds_and_agrees(case)


def test_the_grid_is_the_whole_grid():
    grid = list(cases.cases(["attention"], "default", True))
    assert len(grid) == 3 * 3 * 4 * 2 * 2
    assert len({c.key for c in grid}) == len(grid)


def test_geometric_means():
    case = next(cases.cases(["mlp"], "default", False))
    nan = float("nan")
    results = [
        measure.Result(case, "eager", 5, ratio, ratio, ratio, 1.0, 1.0, None, None, "", ROOF)
        for ratio in (0.5, 8.0)
    ]
    results.append(measure.Result(case, "", 0, *[nan] * 5, None, None, "wrong"))
    ((op, kind, peer, mean, lowest),) = report.geometric_means(results)
    assert (op, kind, peer, lowest) == ("mlp", "float32 forward", "eager", 0.5)
    assert mean == pytest.approx(2.0)
    assert results[0].percent == pytest.approx(100 * ROOF.seconds(case))
    Console(quiet=True).print(report.table("t", results))
