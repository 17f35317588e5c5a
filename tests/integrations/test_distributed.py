"""Patched models in two processes: sharded, tensor parallel, replicated, in pipelines. Steps and
state_dicts are the stock model's, whether patch comes first or last."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from distributed_worker import GROUPS, WORLD

import fastattn

pytestmark = pytest.mark.native

# Where no kernel runs: FSDP gives what it wraps classes of its own, which patch leaves alone if it
# comes last; hooks gather the weights of a layer that is sharded alone; a weight in parts is not an
# ordinary tensor; a graph is exported as torch's own operations.
TORCHS = {
    ("stack", "fsdp, patch last"),
    ("stack", "fsdp by blocks, patch first"),
    ("stack", "fsdp by blocks, patch last"),
    ("stack", "tensor parallel, patch first"),
    ("stack", "tensor parallel, patch last"),
    ("stack", "exported pipeline"),
    ("encoder", "fsdp, patch last"),
    ("encoder", "fsdp by blocks, patch last"),
}


@pytest.mark.parametrize("group", GROUPS)
def test_two_processes(group, tmp_path):
    if group == "bert" and importlib.util.find_spec("transformers") is None:
        pytest.skip("no transformers")
    worker = Path(__file__).with_name("distributed_worker.py")
    root = str(Path(fastattn.__file__).parents[1])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-W", "ignore", worker, str(r), tmp_path, group] for r in (0, 1)]
    processes = [
        subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    try:
        ends = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * WORLD, "\n".join(e[-1500:] for e in ends)
    for rank in range(WORLD):
        lines = (tmp_path / f"results{rank}").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["case"] for row in rows] == list(GROUPS[group])
        errors = [f"{row['case']}: {row['error']}" for row in rows if row["error"]]
        assert not errors, "\n".join(errors)
        without = {(group, row["case"]) for row in rows if not row["calls"]}
        assert without == {case for case in TORCHS if case[0] == group}
