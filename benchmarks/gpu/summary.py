"""The page that a check ends with."""

from __future__ import annotations

from collections import defaultdict

from gpu.evidence import Evidence

MOST_FINDINGS = 40
OURS = ("cuda", "triton")


def summary(facts: dict, spent: dict[str, float], evidence: Evidence) -> str:
    verdict = "RED" if evidence.red else "GREEN"
    ceilings = ", ".join(f"{name} {value:.0f}" for name, value in facts["ceilings"].items())
    lines = [
        f"{facts['gpu']}, {facts['versions']}",
        *filter(None, [facts.get("state", "")]),
        f"Measured here: {ceilings}.",
        "",
        "| stage | seconds | rows |",
        "|---|---|---|",
        *(f"| {stage} | {seconds:.0f} | {len(evidence.of_stage(stage))} |"
          for stage, seconds in spent.items()),
        "",
        *_speeds(evidence),
    ]  # fmt: skip
    findings = sorted(evidence.findings, key=lambda finding: not finding.red)
    lines += [f"- {'RED' if f.red else 'note'}: {f}" for f in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        lines.append(f"- and {len(findings) - MOST_FINDINGS} more")
    return "\n".join([*lines, "", f"Verdict: {verdict}"])


def _speeds(evidence: Evidence) -> list[str]:
    """Ours beside torch's best, by name: on Hopper its backends differ by a factor of 2."""
    by_case: dict[tuple[str, str], dict[str, tuple[float, str]]] = defaultdict(dict)
    for row in [*evidence.of_stage("speed"), *evidence.of_stage("Triton speed")]:
        if row["ms"]:
            case = (row["case"], row["pass"])
            by_case[case][row["implementation"]] = (float(row["ms"]), row["TFLOP/s"])
    if not by_case:
        return []
    lines = ["| case | pass | cuda | triton | best of torch | cuda is faster by | triton |"]
    lines.append("|---" * 7 + "|")
    for (case, what), found in by_case.items():
        best = min((name for name in found if name not in OURS), key=found.get, default="")
        cells = [found[name][1] if name in found else "" for name in OURS]
        cells.append(f"{found[best][1]} ({best})" if best else "")
        cells += [
            f"{found[best][0] / found[name][0]:.2f}x" if best and name in found else ""
            for name in OURS
        ]
        lines.append(f"| {case} | {what} | " + " | ".join(cells) + " |")
    return [*lines, "", "TFLOP/s; more than 1 is faster than torch.", ""]
