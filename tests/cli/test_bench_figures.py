"""The figures of bench: which questions are asked, and what a figure holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")

from fastattn.cli.bench import charts, figures
from fastattn.cli.bench.case import Case
from fastattn.cli.bench.measure import Result, Roofline
from fastattn.cli.page import plt

ROOF = Roofline(1e11, 2e11, 1e10)


def result(op, name, direction, peer, ratio=2.0, memory=(2e6, 4e6), **case) -> Result:
    made = Case(op, name, torch.float32, direction, 1e9, 1e6, lambda: {}, **case)
    sizes = [None if m is None else int(m) for m in memory]
    return Result(made, peer, 5, ratio, ratio, ratio, 0.1, 0.1 * ratio, *sizes, "", ROOF)


RESULTS = [
    result("models", "MiniLM 16x128, fill 0.4", "step", "eager", 2.1, variant="patched"),
    result("models", "MiniLM 16x128, fill 0.4", "step", "eager", 1.2, variant="compiled"),
    result("models", "MiniLM 8x256", "forward", "eager", 1.7, variant="patched"),
    result("models", "MiniLM 8x256", "forward", "OpenVINO", 0.9, (2e6, None), variant="patched"),
    result("attention", "BERT-base 8x12x128x64 full", "forward", "sdpa", 1.37),
    result("attention", "BERT-base 8x12x128x64 full", "backward", "sdpa", 1.5),
    result("attention", "grid 4x12x128x64 full", "forward", "sdpa", 1.4, seq=128),
    result("attention", "grid 4x12x128x64 causal", "forward", "sdpa", 1.8, seq=128),
    result("attention", "grid 4x12x512x64 full", "forward", "sdpa", 1.6, seq=512),
    result("second_order", "GPT-2 full", "jvp", "sdpa math", 3.0, (2e6, 9e8)),
    result("second_order", "GPT-2 full, kernel", "jvp", "our forward", 0.4),
    dataclasses.replace(result("mlp", "784-128-10", "forward", ""), error="wrong"),
]


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list[charts.Value]]:
    """The values of each figure by its question, which no chart is drawn of."""
    found: dict[str, list[charts.Value]] = {}
    for kind in ("ratio_bars", "amount_bars", "points", "ratio_lines"):
        monkeypatch.setattr(figures, kind, lambda values, *more: values)
    for figure in figures.figures(RESULTS):
        found[figure.question] = figure.draw()
        assert figure.how.endswith(".")
    return found


def test_a_figure_for_each_question(drawn):
    assert list(drawn) == [
        "How many times faster is a training step?",
        "How many times faster is inference?",
        "How many times faster is an attention layer?",
        "How many times faster than SDPA is attention, from short to long sequences?",
        "How many times faster are forward mode and the second derivative?",
        "What do forward mode and the second derivative cost beside our own forward and backward?",
        "Which share of the machine's peak do the kernels reach?",
        "What memory does a training step take?",
        "What memory does inference take?",
        "What memory does attention take?",
        "What memory do forward mode and the second derivative take?",
    ]
    inference = drawn["How many times faster is inference?"]
    assert {v.panel for v in inference} == {"against eager", "against OpenVINO"}
    assert {v.series for v in inference} == {"fastattn patched"}
    memory = drawn["What memory does a training step take?"]
    assert [v.series for v in memory] == ["fastattn patched", "eager", "fastattn compiled"]
    engines = {v.series for v in drawn["What memory does inference take?"]}
    assert engines == {"fastattn patched", "eager"}  # OpenVINO's is not known


def test_costs_beside_ourselves_are_in_a_figure_of_their_own(drawn):
    ours = [
        (q, v) for q, values in drawn.items() for v in values if "our forward" in "".join(v[:3])
    ]
    ((question, value),) = ours
    assert question.startswith("What do forward mode")
    assert value.number == pytest.approx(2.5)


def test_every_chart_writes_its_values():
    texts = {}
    for figure in figures.figures(RESULTS):
        made = figure.draw()
        made.canvas.draw()
        texts[figure.question] = [t.get_text() for ax in made.axes for t in ax.texts]
        scales = {ax.get_xscale() for ax in made.axes}
        if figure.question.startswith("How many"):
            assert scales == {"log"}
        if figure.question.startswith("What memory do forward"):
            assert scales == {"log"}  # 2 MB beside 900
        plt.close(made)
    assert texts["How many times faster is a training step?"] == ["2.10", "1.20"]
    assert texts["What memory do forward mode and the second derivative take?"] == ["2.00", "900"]
    assert "median 10" in "".join(texts["Which share of the machine's peak do the kernels reach?"])


def test_the_page_has_the_tables_and_escapes_names(tmp_path):
    figures.write_html(tmp_path / "x.html", "a <title>", RESULTS[:1])
    page = (tmp_path / "x.html").read_text()
    assert "a &lt;title&gt;" in page
    assert "Every measurement" in page
    assert page.count("data:image/png;base64,") == 3  # time, share of the peak, memory
