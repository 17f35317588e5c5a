"""``python -m fastattn.verification BACKEND DEVICE FAMILY...``, a child of ``doctor --check``.

It prints a line of JSON for each family and ends after the first that raised: a CUDA error stays
with its process."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch

from fastattn.verification import families
from fastattn.verification.children import MARK
from fastattn.verification.families import Outcome
from fastattn.verification.problems import Device


def main(backend: str, device: str, *names: str) -> None:
    at = Device(backend, torch.device(device))
    for name in names:
        started = time.perf_counter()
        try:
            outcome = families.check(name, at, families.cases(backend, at.device))
        except torch.OutOfMemoryError as error:
            outcome = Outcome(exception=f"out of memory: {error}".splitlines()[0])
        report = {"outcome": dataclasses.asdict(outcome), "seconds": time.perf_counter() - started}
        print(MARK + json.dumps(report), flush=True)
        if outcome.exception:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
