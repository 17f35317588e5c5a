"""The models that are timed whole, how they are built, and what they have to compute."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fastattn.cli.pretrained import model_path

Kind = Literal["text encoder", "decoder", "image encoder"]
CLASSES = 8  # of sentences
_HEADED = {
    "text encoder": "AutoModelForSequenceClassification",
    "decoder": "AutoModelForCausalLM",
    "image encoder": "AutoModelForImageClassification",
}
_ROWWISE = ("pooler", "classifier")  # these see a sequence's first token alone


@dataclass(frozen=True)
class Model:
    """A model of Hugging Face transformers with sdpa, whole or its first layers alone."""

    family: str
    kind: Kind
    config: Any = field(repr=False, compare=False)
    weights: str | None = None  # the folder of pretrained ones; else they are drawn
    note: str = ""  # how it differs from the model that the family's name stands for

    @property
    def name(self) -> str:
        return f"{self.family}{self.note}"

    @property
    def padded(self) -> bool:
        return self.kind == "text encoder"

    def build(self, training: bool) -> nn.Module:
        """Float32, in evaluation mode; for training with the head of its task. The weights are the
        same at every call."""
        import transformers

        kind = getattr(transformers, _HEADED[self.kind] if training else "AutoModel")
        config = copy.deepcopy(self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.weights is None:
                return kind.from_config(config, attn_implementation="sdpa").eval()
            return kind.from_pretrained(
                self.weights, config=config, attn_implementation="sdpa", dtype=torch.float32
            ).eval()

    def flops(self, lengths: tuple[int, ...], training: bool) -> float:
        """Of the products and of attention, for tokens and not for padding: those of the forward,
        three times as many for a training step."""
        attended = sum(n * n for n in lengths) * _attention_width(self.config)
        share = 0.5 if self.kind == "decoder" else 1.0
        forward = 2.0 * sum(lengths) * _dense_weights(self, training) + 4.0 * share * attended
        return forward * (3 if training else 1)

    def bytes(self, lengths: tuple[int, ...], training: bool, itemsize: int) -> float:
        """The weights once, and some ten tensors of a layer's tokens."""
        config = self.config
        rows = 10.0 * sum(lengths) * config.hidden_size * config.num_hidden_layers
        return itemsize * (_dense_weights(self, training) + rows) * (3 if training else 1)


def _attention_width(config: Any) -> int:
    """Heads times head dim, over all layers."""
    return config.hidden_size * config.num_hidden_layers


@functools.cache
def _dense_weights(model: Model, training: bool) -> int:
    """Elements of the matrices that multiply each token."""
    drawn = Model(model.family, model.kind, model.config)
    with torch.device("meta"):
        modules = list(drawn.build(training).named_modules())
    return sum(
        module.weight.numel()
        for name, module in modules
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() > 1
        and not isinstance(module, nn.Embedding)
        and not any(part in name for part in _ROWWISE)
    )


def models(whole: bool, quick: bool) -> Iterator[Model]:
    """MiniLM, BERT-base, GPT-2, ViT-B/16, Llama-like. Unless ``whole``, of the last four a few
    layers; under ``quick`` two narrow layers of each.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # a classification head that is drawn is no surprise here
    logging.disable_progress_bar()
    config, weights = _minilm()
    note = "" if weights else " (random weights)"
    for made in (
        Model("MiniLM", "text encoder", config, weights, note),
        _of_depth("BERT-base", "text encoder", _bert(768, 12, 12, 3072), None if whole else 4),
        _of_depth("GPT-2", "decoder", _gpt2(), None if whole else 2),
        _of_depth("ViT-B/16", "image encoder", _vit(), None if whole else 2),
        _of_depth("Llama-like", "decoder", _llama(), None if whole else 2),
    ):
        yield _tiny(made) if quick else made


def _of_depth(family: str, kind: Kind, config: Any, layers: int | None) -> Model:
    """With ``layers`` layers; None: all."""
    if layers is None:
        return Model(family, kind, config)
    note = f" ({layers} of {config.num_hidden_layers} layers)"
    config.num_hidden_layers = layers
    return Model(family, kind, config, note=note)


def _tiny(model: Model) -> Model:
    sizes = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 256, "image_size": 32,
    }  # fmt: skip
    config = copy.deepcopy(model.config)
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads, config.head_dim = 2, 16
    return Model(model.family, model.kind, config, note=" (tiny)")


def _minilm() -> tuple[Any, str | None]:
    from transformers import AutoConfig

    try:
        folder = model_path(None)
    except FileNotFoundError:
        return _bert(384, 6, 12, 1536), None
    labels = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
    return AutoConfig.from_pretrained(folder, **labels), folder


def _bert(width: int, layers: int, heads: int, hidden: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=hidden, num_labels=CLASSES, problem_type="single_label_classification",
    )  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(use_cache=False)


def _vit() -> Any:
    from transformers import ViTConfig

    return ViTConfig(num_labels=1000, problem_type="single_label_classification")


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=2816, vocab_size=8192, use_cache=False,
    )  # fmt: skip
