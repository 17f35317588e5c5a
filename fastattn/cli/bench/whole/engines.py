"""ONNX Runtime and OpenVINO, which run a model that torch has exported, on torch's thread count."""

from __future__ import annotations

import functools
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.cli.bench.whole.batches import batch_of, image_tokens
from fastattn.cli.bench.whole.models import Model

Inputs = dict[str, Tensor]
_OUTPUT = "last_hidden_state"
_EXPORTER = ("onnx", "onnxscript")


def onnx_runtime(model: Model, inputs: Inputs) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads wait busily after a run, on cores that the next implementation needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exported(model), options, providers=["CPUExecutionProvider"]
    )
    arrays = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def openvino(model: Model, inputs: Inputs) -> Callable[[], Tensor]:
    import openvino

    core = openvino.Core()
    read = core.read_model(exported(model))
    read.reshape({name: list(x.shape) for name, x in inputs.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    arrays = {name: x.numpy() for name, x in inputs.items()}
    return lambda: torch.from_numpy(request.infer(arrays)[0])


ENGINES: dict[str, Callable[[Model, Inputs], Callable[[], Tensor]]] = {
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}
_PACKAGES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def missing(engine: str) -> list[str]:
    """The packages that ``engine`` needs and that are not installed."""
    needed = (_PACKAGES[engine], *_EXPORTER)
    return [name for name in needed if importlib.util.find_spec(name) is None]


class _Positional(nn.Module):
    """A model called with tensors alone; returns its hidden states."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).last_hidden_state


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastattn-bench-")


@functools.cache
def exported(model: Model) -> str:
    """The model's file, of any batch and, for words, any length; removed when the process ends."""
    inputs = batch_of(model, _example_lengths(model), torch.float32).inputs
    path = Path(_folder().name) / f"{len(list(Path(_folder().name).iterdir()))}.onnx"
    axes: tuple[Any, ...] = (torch.export.Dim("batch"),)
    if model.kind != "image encoder":
        axes += (torch.export.Dim("seq"),)
    names = tuple(inputs)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says at length which packages it does without
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Positional(model.build(training=False), names), tuple(inputs.values()), path,
                dynamo=True, verbose=False, input_names=names, output_names=[_OUTPUT],
                dynamic_shapes=(tuple(dict(enumerate(axes)) for _ in names),),
            )  # fmt: skip
    finally:
        logger.setLevel(level)
    return str(path)


def _example_lengths(model: Model) -> tuple[int, ...]:
    return (image_tokens(model),) * 2 if model.kind == "image encoder" else (24, 11)
