"""One of two processes that train patched and stock models side by side. ``test_distributed.py``
starts it: ``python distributed_worker.py RANK FOLDER GROUP``. Each writes a line for each case."""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastattn
from fastattn import functional
from fastattn.functional import _served

WORLD = 2
Make = Callable[[], nn.Module]


# --- models ---------------------------------------------------------------------------------------


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


MODELS: dict[str, Make] = {"stack": stack, "encoder": encoder, "bert": bert}
# The layers that are sharded by themselves, and the plan of the tensor parallel one.
BLOCKS = {
    "stack": lambda m: [m[0]],
    "encoder": lambda m: list(m.layers),
    "bert": lambda m: list(m.bert.encoder.layer),
}
PARALLEL = {
    "stack": {"0": ColwiseParallel(), "2": RowwiseParallel()},
    "encoder": {"layers.*.linear1": ColwiseParallel(), "layers.*.linear2": RowwiseParallel()},
    "bert": {
        "bert.encoder.layer.*.intermediate.dense": ColwiseParallel(),
        "bert.encoder.layer.*.output.dense": RowwiseParallel(),
    },
}


def batch(name: str, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    if name == "bert":
        return torch.randint(0, 64, (2, 6), generator=generator)
    return torch.randn((4, 8) if name == "stack" else (2, 5, 8), generator=generator)


# --- ways of spreading a model over processes -----------------------------------------------------


def whole_sharded(model: nn.Module, name: str, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def blocks_sharded(model: nn.Module, name: str, mesh: DeviceMesh) -> nn.Module:
    for block in BLOCKS[name](model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, name: str, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, dict(PARALLEL[name]))


WAYS = {
    "fsdp": whole_sharded,
    "fsdp by blocks": blocks_sharded,
    "tensor parallel": tensor_parallel,
    "ddp": lambda model, name, mesh: DistributedDataParallel(model),
}
ORDERS = ("patch first", "patch last")


def build(name: str, way: str, mesh: DeviceMesh, order: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if order == "patch first":
        assert fastattn.patch(model).swapped
    model = WAYS[way](model, name, mesh)
    if order == "patch last":
        fastattn.patch(model)
    return model


def trained(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The losses of three steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        out = model(x)
        # After a LayerNorm the mean of the squares alone would be the same for all weights.
        loss = (out if isinstance(out, Tensor) else out.logits).sin().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def assert_same_state(ours: nn.Module, stock: nn.Module) -> None:
    """Gathered and in shards: keys, places, values."""
    for options in (StateDictOptions(full_state_dict=True), None):
        a, b = (get_model_state_dict(m, options=options) for m in (ours, stock))
        assert list(a) == list(b), (list(a), list(b))
        for key, x in a.items():
            y = b[key]
            assert type(x) is type(y), (key, type(x), type(y))
            if isinstance(x, DTensor):
                assert x.placements == y.placements
                x, y = x.to_local(), y.to_local()
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=key)
    assert list(ours.state_dict()) == list(stock.state_dict())


def side_by_side(name: str, way: str, order: str, mesh: DeviceMesh) -> None:
    x = batch(name, 0 if way == "tensor parallel" else dist.get_rank())
    stock = build(name, way, mesh, None)
    expected = trained(stock, x)
    ours = build(name, way, mesh, order)
    torch.testing.assert_close(trained(ours, x), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(ours, stock)
    fastattn.unpatch(ours)
    torch.testing.assert_close(trained(ours, x), trained(stock, x), rtol=1e-4, atol=1e-5)


def meta_then_sharded(mesh: DeviceMesh) -> None:
    """Build without data, patch, shard, then load."""
    torch.manual_seed(0)
    stock = encoder()
    with torch.device("meta"):
        ours = encoder()
    assert fastattn.patch(ours).swapped
    blocks_sharded(ours, "encoder", mesh).to_empty(device="cpu")
    set_model_state_dict(ours, stock.state_dict(), options=StateDictOptions(full_state_dict=True))
    x = batch("encoder", 0)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


def exported_stages(mesh: DeviceMesh) -> None:
    """torch splits a graph that it exports from the model."""
    from torch.distributed.pipelining import SplitPoint, pipeline

    torch.manual_seed(0)
    stock = nn.Sequential(stack(), stack())
    ours, x = copy.deepcopy(stock), torch.randn(4, 8)
    assert len(fastattn.patch(ours).swapped) == 2
    made = [pipeline(m, (x,), split_spec={"1": SplitPoint.BEGINNING}) for m in (ours, stock)]
    assert made[0].num_stages == made[1].num_stages == 2
    torch.testing.assert_close(made[0](x), made[1](x), rtol=1e-4, atol=1e-5)
    rank = dist.get_rank()
    keys = [list(pipe.get_stage_module(rank).state_dict()) for pipe in made]
    assert keys[0] == keys[1]


def in_stages(mesh: DeviceMesh) -> None:
    """A pipeline of two stages, one a process."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    torch.manual_seed(0)
    stock = nn.Sequential(stack(), stack())
    ours = nn.Sequential(*(m for m in stock))
    x = torch.randn(8, 8)
    dist.broadcast(x, 0)
    expected = stock(x)
    expected.square().mean().backward()
    gradient = stock[dist.get_rank()][0].weight.grad.clone()
    stock.zero_grad()
    assert len(fastattn.patch(ours).swapped) == 2
    rank = dist.get_rank()
    stage = PipelineStage(ours[rank], rank, WORLD, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: out.square().mean())
    if rank == 0:
        schedule.step(x)
    else:
        out = schedule.step(target=x, losses=[])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    # Each of the two parts of the batch gives the mean over its rows, and their gradients' mean.
    torch.testing.assert_close(ours[rank][0].weight.grad, gradient, rtol=1e-4, atol=1e-5)


GROUPS: dict[str, dict[str, Callable[[DeviceMesh], None]]] = {
    name: {
        f"{way}, {order}": lambda mesh, a=(name, way, order): side_by_side(*a, mesh)
        for way in WAYS
        for order in ORDERS
    }
    for name in MODELS
}
GROUPS["stack"] |= {
    "meta, then fsdp": meta_then_sharded,
    "pipeline": in_stages,
    "exported pipeline": exported_stages,
}


def main() -> None:
    rank, folder, group = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    _served.LEAST_WORK = _served.LEAST_ATTENTION = 0  # small problems too run the kernels
    calls = Counter()
    for function in ("linear_relu", "mlp", "scaled_dot_product_attention"):
        whole = getattr(functional, function)

        def counted(*args, name=function, whole=whole, **options):
            calls[name] += 1
            return whole(*args, **options)

        setattr(functional, function, counted)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mesh = init_device_mesh("cpu", (WORLD,))
    with (folder / f"results{rank}").open("w") as lines:
        for case, run in GROUPS[group].items():
            calls.clear()
            error = None
            try:
                run(mesh)
            except Exception:
                error = traceback.format_exc()
            row = {"case": case, "error": error, "calls": dict(calls)}
            print(json.dumps(row), file=lines, flush=True)
    dist.barrier()  # neither rank goes while the other still listens
    dist.destroy_process_group()
    # A thread of gloo's that is still there when C++ objects are destroyed aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
