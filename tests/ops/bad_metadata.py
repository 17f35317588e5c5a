"""Calls of the native ops with bad arguments, made of good calls: ``python bad_metadata.py SEED
COUNT OP ...`` prints each call before it is made, and ends with 0 if every one of them raised an
exception or gave results of the right shapes."""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import fastattn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 2**31, 2**60 - 1, 2**60, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 5e-324, 0.5, 1.0, 1.5, 1e300)


def attention_call(rng: random.Random, op: str) -> dict[str, object]:
    packed = rng.random() < 0.3
    batch = (1,) if packed else tuple(rng.choice((1, 2, 3)) for _ in range(rng.randint(0, 3)))
    heads, heads_k = rng.choice(((1, 1), (4, 4), (4, 2), (6, 1)))
    seq_q, seq_k = rng.choice((0, 1, 5, 13)), rng.choice((0, 1, 7, 70))
    dim, dim_v = rng.choice((1, 8, 33)), rng.choice((0, 1, 8, 17))
    if rng.random() < 0.1:
        dim = 0
    dtype = rng.choice(DTYPES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*batch, *shape, dtype=torch.float32).to(kind)

    tensors = {
        "query": new(heads, seq_q, dim),
        "key": new(heads_k, seq_k, dim),
        "value": new(heads_k, seq_k, dim_v),
        "attn_mask": None,
        "slopes": None,
        "seed": torch.tensor([7]),
        "starts_q": None,
        "starts_k": None,
        "grad_out": new(heads, seq_q, dim_v),
        "grad_lse": new(heads, seq_q, kind=wide),
        "out": new(heads, seq_q, dim_v),
        "row_max": new(heads, seq_q, kind=wide),
        "log_sum": new(heads, seq_q, kind=wide),
        "t_mask": None,
    }
    for name in ("query", "key", "value"):
        tensors[f"t_{name}"] = rng.choice((None, torch.randn_like(tensors[name])))
    if packed:
        tensors["starts_q"] = torch.tensor([0, seq_q // 2, seq_q])
        tensors["starts_k"] = torch.tensor([0, seq_k // 2, seq_k], dtype=torch.int32)
    elif rng.random() < 0.5:
        rows = rng.choice((1, seq_q))
        tensors["attn_mask"] = new(rng.choice((1, heads)), rows, seq_k)
        tensors["t_mask"] = rng.choice((None, torch.randn_like(tensors["attn_mask"])))
        if tensors["t_mask"] is None and rng.random() < 0.5:
            tensors["attn_mask"] = tensors["attn_mask"] > 0
    if rng.random() < 0.3:
        tensors["slopes"] = torch.rand(heads, dtype=wide)
    numbers = {
        "is_causal": rng.random() < 0.5,
        "scale": 0.3,
        "dropout_p": rng.choice((0.0, 0.5)),
        "left": rng.choice((-1, 3)),
        "right": rng.choice((-1, 2)),
        "softcap": rng.choice((0.0, 2.0)),
        "max_q": 0,
        "max_k": 0,
    }
    mask = tensors["attn_mask"]
    float_mask = mask is not None and mask.dtype != torch.bool
    needs = [rng.random() < 0.7 for _ in range(4 if op == "attention_backward" else 5)]
    needs[-1] = needs[-1] and float_mask
    return tensors | numbers | {"needs": needs}


def linear_call(rng: random.Random, op: str) -> dict[str, object]:
    dtype = rng.choice(DTYPES)
    rows = tuple(rng.choice((1, 2, 7)) for _ in range(rng.randint(0, 3)))
    layers = rng.randint(1, 3) if op.startswith("mlp") else 1
    widths = [rng.choice((1, 8, 17, 70)) for _ in range(layers + 1)]

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    weights = [new(o, i) for i, o in pairwise(widths)]
    biases = [new(o) for o in widths[1:]]
    x = new(*rows, widths[0])
    mask = torch.ops.fastattn.linear_relu_forward(x, weights[0], biases[0])[1]
    return {
        "input": x,
        "weight": weights[0],
        "bias": rng.choice((None, biases[0])),
        "mask": mask,
        "grad_out": new(*rows, widths[-1]),
        "t_input": rng.choice((None, torch.randn_like(x))),
        "t_weight": rng.choice((None, torch.randn_like(weights[0]))),
        "t_bias": rng.choice((None, biases[0])),
        "weights": weights,
        "biases": biases,
        "hidden": [new(*rows, w) for w in widths[1:-1]],
        "needs": [rng.random() < 0.7 for _ in range(3 if layers == 1 else 1 + 2 * layers)],
        "like": x,
        "iterations": 1,
    }


def layer_call(rng: random.Random, op: str) -> dict[str, object]:
    dtype = rng.choice(DTYPES)
    shape = tuple(rng.choice((1, 2, 7)) for _ in range(rng.randint(0, 3)))
    rows, width = math.prod(shape), rng.choice((0, 1, 8, 17, 70))
    count = rng.randint(1, 3) if op in ("linear_forward", "linear_backward") else 1

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(dtype)

    x, dropout_p = new(*shape, width), rng.choice((0.0, 0.0, 0.5))
    outs = [rng.choice((0, 1, 9, 64, 70)) for _ in range(count)]
    weights, biases = [new(n, width) for n in outs], [new(n) for n in outs]
    saved = [
        rng.choice(
            (
                new(*shape, n),
                new(0),
                torch.zeros(rows, (n + 7) // 8, dtype=torch.uint8),
            )
        )
        for n in outs
    ]
    several = count > 1 and op == "linear_forward"
    return {
        "input": x,
        "weights": weights,
        "biases": [rng.choice((b, new(0))) for b in biases],
        "packed": rng.choice(([], [torch.ops.fastattn.pack_weight(w) for w in weights])),
        "gate_weight": weights[0],
        "weight": weights[0].clone(),
        "gate_bias": rng.choice((None, biases[0])),
        "bias": rng.choice((None, biases[0])),
        "activation": rng.randrange(7),
        "dropout_p": 0.0 if several else dropout_p,
        "seed": torch.arange(rng.choice((1, rows))),
        "save": rng.random() < 0.5,
        "grad_out": torch.randn_like(x),
        "grads": [new(*shape, n) for n in outs],
        "saved": saved,
        "needs": [rng.random() < 0.7 for _ in range(1 + 2 * count)],
    }


def norm_call(rng: random.Random, op: str) -> dict[str, object]:
    dtype = rng.choice(DTYPES)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (*[rng.choice((1, 2, 6)) for _ in range(rng.randint(0, 3))], rng.choice((0, 1, 8, 17)))
    rms, rows = rng.random() < 0.5, math.prod(shape[:-1])

    def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float32).to(kind)

    residual, grad_sum = (rng.choice((None, new(*shape))) for _ in range(2))
    weight, bias = (
        rng.choice((None, new(shape[-1], kind=rng.choice((dtype, wide))))) for _ in range(2)
    )
    return {
        "input": new(*shape),
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "seed": torch.arange(rng.choice((1, rows))),
        "dropout_p": rng.choice((0.0, 0.5)),
        "eps": 1e-5,
        "rms": rms,
        "grad_out": new(*shape),
        "grad_sum": grad_sum,
        "sum": new(*shape),
        "mean": new(0 if rms else rows, kind=wide),
        "rstd": new(rows, kind=wide),
        "needs": [rng.random() < 0.7 for _ in range(4)],
    }


def training_call(rng: random.Random, op: str) -> dict[str, object]:
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    rows, widths = rng.choice((1, 2, 7)), [rng.choice((1, 8, 17)) for _ in range(rng.randint(2, 4))]
    optimizer, loss = rng.randrange(3), rng.randrange(2)
    momentum, variant = rng.choice((0.0, 0.9)), rng.random() < 0.5
    parameters, states = [], []
    for k, n in pairwise(widths):
        parameters += [torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)]
    kept = (momentum != 0, 2 + variant, 1 + (momentum > 0) + variant)[optimizer]
    for p in parameters:
        states += [torch.ones(())] if optimizer else []
        states += [torch.rand_like(p) for _ in range(kept)]
    rule = [0.1, rng.choice((0.0, 0.1)), momentum, 0.5, 1e-8, variant, False, variant]
    classes = torch.randint(widths[-1], (rows,))
    return {
        "input": torch.randn(rows, widths[0], dtype=dtype),
        "targets": torch.randn(rows, widths[-1], dtype=dtype) if loss else classes,
        "parameters": parameters,
        "states": states,
        "rules": torch.tensor([rule] * len(parameters), dtype=torch.float64),
        "relus": [rng.random() < 0.5 for _ in widths[1:]],
        "optimizer": optimizer,
        "loss": loss,
        "mean": rng.random() < 0.5,
        "class_weights": rng.choice((None, torch.rand(widths[-1], dtype=dtype))),
        "ignore_index": rng.choice((-100, 0)),
        "label_smoothing": rng.choice((0.0, 0.1)),
    }


def bad_tensor(rng: random.Random, x: Tensor) -> object:
    """x of another shape, dtype, layout or device; also what is no worse than x."""
    shape = list(x.shape)
    at = rng.randrange(len(shape)) if shape else 0

    def resized(n: int) -> Tensor:
        return torch.ones([*shape[:at], n, *shape[at + 1 :]], dtype=x.dtype)

    changes = [
        lambda: x[None],
        lambda: x.flatten(),
        lambda: x.reshape(-1)[:1].reshape(()) if x.numel() else x.new_ones(()),
        lambda: x.new_ones([1] * 10),
        lambda: x.to(rng.choice((*DTYPES, torch.bool, torch.int32, torch.int64, torch.uint8))),
        lambda: x.to(torch.complex64),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: None,
        lambda: x.new_empty(0),
    ]
    if shape:
        changes += [
            *[lambda n=n: resized(n) for n in (0, 1, 2, 3, 5, 64)],
            lambda: x.new_ones(()).expand([*shape[:at], 2**40, *shape[at + 1 :]]),
            lambda: x.new_ones(()).expand(shape),
            lambda: x.narrow(at, 0, max(0, shape[at] - 1)),
            lambda: x.transpose(at, -1),
            lambda: x.transpose(at, -1).contiguous().transpose(at, -1),
            lambda: (
                x.repeat_interleave(2, at).unflatten(at, (-1, 2)).select(at + 1, 0)
                if shape[at]
                else x
            ),
            lambda: x.select(at, 0) if shape[at] else x[None],
            lambda: x.new_ones(sum(shape) + 1).as_strided(shape, [1] * len(shape)),
            lambda: torch.ones([*shape, 1], dtype=x.dtype)[..., 0],
        ]
    if not x.dtype.is_floating_point and x.dim() == 1:  # seeds, starts, masks
        changes += [
            *[lambda n=n: torch.full_like(x, n) for n in (0, 1, 5, 13, 2**31 - 1)],
            lambda: torch.full(x.shape, rng.choice(INTEGERS)),
            lambda: x.flip(0),
            lambda: torch.cat([x, x]),
            lambda: torch.arange(rng.choice((0, 1, 2, 3, 4, 6))),
        ]
    return rng.choice(changes)()


def bad(rng: random.Random, value: object, kind: str) -> object:
    if isinstance(value, Tensor):
        return bad_tensor(rng, value)
    if kind == "int":
        return rng.choice(INTEGERS)
    if kind == "float":
        return rng.choice(FLOATS)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        at = rng.randrange(len(value))
        changed = [*value[:at], bad_tensor(rng, value[at]), *value[at + 1 :]]
        return rng.choice((changed, changed, value[:-1], [*value, value[0]], []))
    if isinstance(value, list):
        flipped = [not x for x in value]
        return rng.choice((flipped, [True] * len(value), [True] * 9, value[:-1], []))
    if value is None:
        return torch.ones(rng.choice(([], [0], [1], [2], [1, 1, 1, 1])))
    return not value


def calls(op: str, seed: int):
    """The calls of ``op`` without an end: ``(text, arguments)``."""
    schema = getattr(torch.ops.fastattn, op).default._schema
    if op == "pack_weight":
        op = "linear_forward"  # whose call has a weight
    families = {
        "attention": attention_call, "dropout": norm_call, "activation": layer_call,
        "gated": layer_call, "training": training_call,
    }  # fmt: skip
    make = families.get(op.split("_")[0], linear_call)
    make = layer_call if op in ("linear_forward", "linear_backward") else make
    for number in range(seed * 1_000_000, (seed + 1) * 1_000_000):
        rng = random.Random(number)
        torch.manual_seed(number)
        good = make(rng, op)
        args = {a.name: good[a.name] for a in schema.arguments}
        kinds = {a.name: str(a.type) for a in schema.arguments}
        changed = [name for name in args if name != "iterations"]
        for name in rng.sample(changed, min(len(changed), rng.choice((0, 1, 1, 1, 2, 3)))):
            args[name] = bad(rng, args[name], kinds[name])
        yield f"{op} {number} " + ", ".join(f"{n}={text(v)}" for n, v in args.items()), args


def text(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(text, value)) + "]"
    if not isinstance(value, Tensor):
        return repr(value)
    strided = value.layout is torch.strided
    strides = value.stride() if strided else value.layout
    small = strided and value.is_cpu and value.dtype == torch.int64 and value.numel() < 20
    values = value.tolist() if small else ""
    return f"{value.dtype}{list(value.shape)}/{strides}{values}"


def shapes(result: object) -> list[tuple]:
    results = [result] if isinstance(result, Tensor) else result
    return [(tuple(x.shape), x.dtype) for x in results if isinstance(x, Tensor)]


def fake(op, args: dict[str, object]) -> list[tuple]:
    """The right shapes and dtypes."""
    with FakeTensorMode() as mode:

        def convert(x: object) -> object:
            if isinstance(x, list):
                return [convert(each) for each in x]
            return mode.from_tensor(x) if isinstance(x, Tensor) else x

        return shapes(op(*map(convert, args.values())))


def main(op: str, seed: int, count: int) -> None:
    torch.set_num_threads(1)
    function = getattr(torch.ops.fastattn, op)
    raised = 0
    stream = calls(op, seed)
    for _ in range(count):
        line, args = next(stream)
        print(line, flush=True)
        try:
            result = function(*args.values())
        except Exception:
            raised += 1
            continue
        if op != "fma_probe" and shapes(result) != fake(function, args):
            raise AssertionError(f"{shapes(result)} for {fake(function, args)}")
    assert 0 < raised < count, f"{op}: {raised} of {count} calls raised"
    print(f"{op}: {raised} of {count} calls raised", flush=True)


if __name__ == "__main__":
    assert fastattn.__file__
    for name in sys.argv[3:]:
        main(name, int(sys.argv[1]), int(sys.argv[2]))
