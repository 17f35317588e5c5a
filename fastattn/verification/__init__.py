"""Whether the kernels are right on this machine: all of them for ``fastattn doctor --check``, those
of a call when a GPU first sees them. The kernels are called as ops and compared with the
reference."""
