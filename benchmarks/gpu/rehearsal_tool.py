"""Stands in for ncu and compute-sanitizer in a rehearsal: runs the program after its options."""

import subprocess
import sys

arguments = sys.argv[1:]
print("a stand-in for a tool")
raise SystemExit(subprocess.run(arguments[arguments.index(sys.executable) :]).returncode)
