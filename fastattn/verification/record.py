"""What earlier checks found on this GPU, in the user's cache folder: a file for each kernel.

Nothing here fails: where the folder cannot be read or written, nothing is known or kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from fastattn import _extension

_TRITON = Path(__file__).resolve().parents[1] / "ops" / "triton"


class Kernel(NamedTuple):
    """What is checked as one, and kept under its name."""

    backend: str
    family: str
    dtype: str = ""  # float32, ...
    head_dim: int = 0  # the power of two that the call's is rounded up to; 0 of linear layers

    @property
    def instance(self) -> str:
        """Which of its family's it is."""
        return self.dtype + (f" head dim {self.head_dim}" if self.head_dim else "")

    def __str__(self) -> str:
        return f"{self.family} ({self.instance})"


def identity(gpu: int) -> dict[str, str]:
    """All that a kernel's result may depend on: the GPU, the driver, and what compiled it."""
    from fastattn import __version__

    properties = torch.cuda.get_device_properties(gpu)
    return {
        "gpu": f"{properties.name} ({properties.major}.{properties.minor})",
        "driver": _driver(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": _version("triton"),
        "fastattn": __version__,
        "kernels": _kernels(),
    }


def folder(known_as: dict[str, str]) -> Path:
    """Where the results of one GPU, driver and set of versions are kept."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if not os.path.isabs(home):
        raise FileNotFoundError("there is no home folder")
    digest = hashlib.sha256(json.dumps(known_as, sort_keys=True).encode()).hexdigest()[:16]
    return Path(home) / "fastattn" / "verified" / digest


def read(known_as: dict[str, str]) -> dict[Kernel, str]:
    """Why each kernel that was checked failed; "" of those that did not."""
    found = {}
    with contextlib.suppress(OSError):
        for path in sorted(folder(known_as).glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                entry = json.loads(path.read_text())
                failure = entry["failure"]
                if entry["identity"] == known_as and isinstance(failure, str):
                    found[Kernel(**entry["kernel"])] = failure
    return found


def write(known_as: dict[str, str], kernel: Kernel, failure: str) -> None:
    """Keeps a result; another process sees the whole file or none."""
    entry = {"kernel": kernel._asdict(), "failure": failure, "identity": known_as}
    with contextlib.suppress(OSError):
        where = folder(known_as)
        where.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(entry, file, indent=1)
            os.replace(temporary, where / _file_name(kernel))
        except OSError:
            os.unlink(temporary)


def remove(known_as: dict[str, str], kernel: Kernel) -> None:
    """Forgets a result."""
    with contextlib.suppress(OSError):
        (folder(known_as) / _file_name(kernel)).unlink()


def _file_name(kernel: Kernel) -> str:
    return "-".join(str(part) for part in kernel if part) + ".json"


def _driver() -> str:
    """The driver's own version where Linux tells it, and the newest CUDA that it serves."""
    served = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")
    text = f"CUDA {served()}"
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/driver/nvidia/version").read_text().splitlines()[0] + f", {text}"
    return text


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _kernels() -> str:
    """A name for the kernels as they are: a rebuilt library or an edited source is another one."""
    files = [_extension.cuda_library(), *sorted(_TRITON.glob("*.py"))]
    facts = []
    for file in files:
        with contextlib.suppress(OSError):
            stat = file.stat()
            facts.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
