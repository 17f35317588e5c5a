"""Forwards known by their bytecode: what matches, what does not, the models they are in."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.integrations import forwards

IMPORTS = """
import torch
from torch import nn
from torch.nn.functional import gelu
import torch.nn.functional as F
"""


def compiled(arguments: str, body: str, imports: str = IMPORTS) -> object:
    space: dict[str, object] = {"F": F, "nn": nn, "torch": torch, "gelu": F.gelu}
    lines = "".join(f"    {line.strip()}\n" for line in body.split(";"))
    exec(f"{imports}\ndef forward(self, {arguments}):\n    'A docstring.'\n{lines}", space)
    return space["forward"]


CHAINS = {
    "return self.act(self.fc1(x))": ["fc1", "act"],
    "x = self.fc1(x); return self.act(x)": ["fc1", "act"],
    "return self.fc2(self.act(self.fc1(x)))": ["fc1", "act", "fc2"],
    "h = self.fc1(x); h = self.act(h); h = self.fc2(h); return h": ["fc1", "act", "fc2"],
    "z = self.fc1(x); h = self.act(z); return self.fc2(h)": ["fc1", "act", "fc2"],
    "x = self.act(self.fc1(x)); x = self.fc2(x); return x": ["fc1", "act", "fc2"],
    "x = self.drop(self.act(self.fc1(x))); return self.drop(self.fc2(x))":
        ["fc1", "act", "drop", "fc2", "drop"],
    "x = self.fc1(x); x = self.act(x); x = self.drop1(x); x = self.norm(x); x = self.fc2(x);"
    "x = self.drop2(x); return x": ["fc1", "act", "drop1", "norm", "fc2", "drop2"],
    "return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))":
        ["fc1", "act", "fc2", "act", "fc3"],
}  # fmt: skip


@pytest.mark.parametrize("body", CHAINS)
def test_chains(body):
    found = forwards.match(compiled("x", body))
    assert found.known.kind == "chain"
    assert [found.names[item] for item in found.known.items] == CHAINS[body]
    assert found.arguments == ("x",)


@pytest.mark.parametrize("imports", [IMPORTS, ""], ids=["a module", "a cell of a notebook"])
@pytest.mark.parametrize(
    "body, function",
    [
        ("return self.fc2(gelu(self.fc1(x)))", F.gelu),
        ("return self.fc2(self.drop(nn.functional.silu(self.fc1(x))))", F.silu),
        ("x = F.relu(self.fc1(x)); x = F.relu(self.fc2(x)); return self.fc3(x)", F.relu),
        ("return torch.relu(self.fc1(x))", torch.relu),
    ],
)
def test_functions_in_chains(body, function, imports):
    found = forwards.match(compiled("x", body, imports))
    assert found.value(nn.Module(), found.known.items[1]) is function


OTHERS = {
    "two results": ("x", "x = self.a(x); return x, self.b(x)"),
    "the input twice": ("x", "y = self.a(x); return self.b(x)"),
    "a sum": ("x", "return x + self.b(self.a(x))"),
    "another name": ("x", "return self.a(x).relu()"),
    "a default": ("x=None", "return self.b(self.a(x))"),
    "two arguments": ("x, y", "return self.b(self.a(x))"),
    "by keyword alone": ("*, x", "return self.b(self.a(x))"),
    "by position alone": ("x, /", "return self.b(self.a(x))"),
    "another constant": (
        "x",
        "d = x.dtype; x = x.to(torch.float32); v = x.pow(3).mean(-1, keepdim=True);"
        "x = x * torch.rsqrt(v + self.e); return self.w * x.to(d)",
    ),
    "another method": (
        "x",
        "d = x.dtype; x = x.to(torch.float32); v = x.pow(2).sum(-1, keepdim=True);"
        "x = x * torch.rsqrt(v + self.e); return self.w * x.to(d)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_code(name):
    assert forwards.match(compiled(*OTHERS[name])) is None


@pytest.mark.parametrize("other", [None, len, nn.Linear, nn.Module().forward, lambda self, x: x])
def test_what_is_no_known_function(other):
    assert forwards.match(other) is None


def test_a_closure_is_left_alone():
    def make(x):
        def forward(self, x):
            return self.b(self.a(x))

        def other(self, y):
            return self.b(self.a(x))

        return forward, other

    known, other = make(1)
    assert forwards.match(known) is not None
    assert forwards.match(other) is None


def test_a_global_of_another_meaning(monkeypatch):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    found = forwards.match(llama.LlamaRMSNorm.forward)
    assert found.means_the_same()
    monkeypatch.setattr(llama, "torch", object())
    assert not found.means_the_same()
    assert forwards.match(llama.LlamaRMSNorm.forward) is None


FAMILIES = {
    "bert.BertIntermediate": "chain", "vit.ViTMLP": "chain", "clip.CLIPMLP": "chain",
    "deit.DeiTMLP": "chain", "gpt2.GPT2MLP": "chain", "gpt_neox.GPTNeoXMLP": "chain",
    "falcon.FalconMLP": "chain", "gptj.GPTJMLP": "chain", "distilbert.FFN.ff_chunk": "chain",
    "wav2vec2.Wav2Vec2FeedForward": "chain", "xlm_roberta.XLMRobertaOutput": "normed",
    "roberta.RobertaSelfOutput": "normed", "electra.ElectraOutput": "normed",
    "mpnet.MPNetOutput": "normed", "llama.LlamaMLP": "gated", "gemma.GemmaMLP": "gated",
    "qwen2.Qwen2MLP": "gated", "t5.T5DenseActDense": "chain to dtype",
    "t5.T5DenseGatedActDense": "gated to dtype", "llama.LlamaRMSNorm": "rms norm",
    "qwen3.Qwen3RMSNorm": "rms norm", "gemma.GemmaRMSNorm": "rms norm plus one",
    "t5.T5LayerNorm": "rms norm in one dtype", "olmo2.Olmo2RMSNorm": "rms norm, then rounded",
}  # fmt: skip


@pytest.mark.parametrize("path", FAMILIES)
def test_the_families_of_transformers(path):
    pytest.importorskip("transformers")
    family, kind, *method = path.split(".")
    home = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = forwards.match(getattr(getattr(home, kind), *method or ["forward"]))
    assert found is not None
    assert found.known.kind == FAMILIES[path]


def test_conv1d():
    utils = pytest.importorskip("transformers.pytorch_utils")
    assert forwards.match(utils.Conv1D.forward).known.kind == "conv1d"
