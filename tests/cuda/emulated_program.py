"""Programs compiled by the C++ compiler against the emulated instructions of Hopper."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def build(source: Path, program: Path, *flags: str) -> None:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cuda'}"]
    command = [*shlex.split(CXX), "-std=c++20", *flags, *includes, str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)


def output_of(tmp_path: Path, text: str) -> str:
    """What a program prints."""
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(text)
    build(source, program)
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout
