"""What a type checker tells a user: the package ships py.typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An expression, and its type.
REVEALED = {
    "fastattn.scaled_dot_product_attention(x, x, x)": "torch._tensor.Tensor",
    "fastattn.scaled_dot_product_attention(x, x, x, return_lse=True)": (
        "tuple[torch._tensor.Tensor, torch._tensor.Tensor]"
    ),
    "fastattn.varlen_attn(x, x, x, x, x, 1, 1)": "torch._tensor.Tensor",
    "fastattn.varlen_attn(x, x, x, x, x, 1, 1, return_lse=True)[1]": "torch._tensor.Tensor",
    "fastattn.linear_relu(x, x)": "torch._tensor.Tensor",
    "fastattn.mlp(x, [x])": "torch._tensor.Tensor",
    "fastattn.patch(model)": "fastattn.integrations.report.PatchReport",
    "fastattn.plan(model)": "fastattn.integrations.plan.Plan",
    "fastattn.unpatch(model)": "fastattn.integrations.report.PatchReport",
    "fastattn.nn.LinearReLU(4, 2)": "fastattn.nn.linear.LinearReLU",
    "fastattn.backends.available()": "list[str]",
}
WRONG = {
    "fastattn.linear_relu(x, 3)": "arg-type",
    "fastattn.scaled_dot_product_attention(x, x, x, is_causel=True)": "call-overload",
    "fastattn.patches(model)": "attr-defined",
}


def test_a_users_program(tmp_path):
    pytest.importorskip(
        "mypy", reason="mypy is a development dependency, which a GPU machine may lack"
    )
    lines = ["import torch", "import fastattn", "x, model = torch.ones(2), torch.nn.Linear(2, 2)"]
    first = len(lines) + 1
    lines += [f"reveal_type({expression})" for expression in REVEALED] + list(WRONG)
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--config-file", os.devnull, str(program)]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = {
        kind: dict(re.findall(rf"^program\.py:(\d+): {kind}: (.*)$", done.stdout, re.MULTILINE))
        for kind in ("note", "error")
    }
    for number, (expression, expected) in enumerate(REVEALED.items(), first):
        assert said["note"].get(str(number)) == f'Revealed type is "{expected}"', expression
    for number, (expression, code) in enumerate(WRONG.items(), first + len(REVEALED)):
        assert said["error"].pop(str(number), "").endswith(f"[{code}]"), expression
    assert not said["error"]
