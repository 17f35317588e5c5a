"""torch.compile, torch.export, AOTInductor, checkpointing, FLOP counting, autocast and the ops'
own autograd."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import ops, reference
from fastattn.testing import unit_roundoff

pytestmark = pytest.mark.native


def inputs(seq: int = 16, **options):
    return [torch.randn(2, 4, seq, 8, requires_grad=True, **options) for _ in range(3)]


def weights():
    return torch.randn(4, 8, requires_grad=True), torch.randn(2, 4, requires_grad=True)


def function(q, k, v, w, w2):
    out = fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)
    return fastattn.mlp(out, [w, w2]).sum() + fastattn.linear_relu(out, w).square().sum()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = fastattn.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.last = fastattn.nn.LinearReLU(16, 8)

    def forward(self, x):
        return self.last(self.layer(x))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    leaves = [*inputs(), *weights()]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (function, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dynamic", [True, None])
def test_compile_does_not_recompile_for_every_length(dynamic):
    counter, parameters = CompileCounterWithBackend("aot_eager"), weights()
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    for seq in (16, 24, 33, 50, 7, 129):
        leaves = inputs(seq)
        grads = [torch.autograd.grad(f(*leaves, *parameters), leaves) for f in (function, compiled)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2  # the first length, and any length


def loss(q, k, v):
    out = fastattn.scaled_dot_product_attention(q, k, v, window_size=(5, 2))
    return fastattn.linear_relu(out, out[0, 0, :3]).square().sum()


def gradient(q, k, v):
    return grad(loss)(q, k, v)


TRANSFORMS = {
    "grad": gradient,
    "jvp": lambda q, k, v: jvp(lambda q: loss(q, k, v), (q,), (k,))[1],
    "forward over reverse": lambda q, k, v: jvp(lambda q: gradient(q, k, v), (q,), (k,))[1],
    "reverse over reverse": lambda q, k, v: grad(lambda q: gradient(q, k, v).square().sum())(q),
    "vmap": lambda q, k, v: vmap(lambda q, k, v: grad(loss)(q[None], k[None], v[None]))(q, k, v),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_compile_a_transform(transform):
    """Never a derivative less, in or out of the graph."""
    leaves = [x.detach() for x in inputs()]
    compiled = torch.compile(transform, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), transform(*leaves), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = Model().eval(), torch.randn(3, 9, 16)
    lengths = ({1: torch.export.Dim("length", min=2, max=4096)},)
    program = torch.export.export(model, (x,), dynamic_shapes=lengths, strict=strict)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"fastattn.attention_forward.default", "fastattn.linear_relu_forward.default"} <= called
    other = torch.randn(3, 21, 16)
    torch.testing.assert_close(program.module()(other), model(other))


def test_an_exported_model_trains():
    model, x = Model(), torch.randn(3, 9, 16)
    exported = torch.export.export(model, (x,)).module()
    for m in (model, exported):
        m(x).square().sum().backward()
    grads = [[p.grad for p in m.parameters()] for m in (model, exported)]
    torch.testing.assert_close(*grads)


def test_aot_inductor(tmp_path):
    model, x = Model().eval(), torch.randn(3, 9, 16)
    lengths = ({1: torch.export.Dim("length", min=2, max=4096)},)
    program = torch.export.export(model, (x,), dynamic_shapes=lengths)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
    other = torch.randn(3, 21, 16)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(other), model(other))


def second_derivatives(f, leaves):
    grads = torch.autograd.grad(f(*leaves), leaves[:3], create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def test_checkpointing():
    leaves = [*inputs(), *weights()]

    def checkpointed(*leaves):
        return checkpoint(function, *leaves, use_reentrant=False)

    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (function, checkpointed)]
    torch.testing.assert_close(*grads)
    seconds = [second_derivatives(f, leaves) for f in (function, checkpointed)]
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-3)


def test_selective_checkpointing():
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append((op, ctx.is_recompute))
        saved = op == torch.ops.fastattn.attention_forward.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    leaves = [*inputs(), *weights()]
    out = checkpoint(function, *leaves, use_reentrant=False, context_fn=context)
    grads = torch.autograd.grad(out, leaves)
    torch.testing.assert_close(grads, torch.autograd.grad(function(*leaves), leaves))
    assert (torch.ops.fastattn.attention_forward.default, False) in seen


def test_flops():
    q, k, v = inputs()
    unit, w, w2 = 2 * 2 * 4 * 16 * 16 * 8, *weights()
    with FlopCounterMode(display=False) as counter:
        out = fastattn.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == 2 * unit
        grads = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        assert counter.get_total_flops() == (2 + 5) * unit
        torch.autograd.grad(sum(g.square().sum() for g in grads), (q, k, v))
        # 12 for the second derivative, 5 for the first one of its cotangent
        assert counter.get_total_flops() == (2 + 5 + 12 + 5) * unit
    with FlopCounterMode(display=False) as counter:
        jvp(fastattn.scaled_dot_product_attention, (q, k, v), (q, k, v))
    assert counter.get_total_flops() == (2 + 5) * unit
    rows = 2 * 2 * 4 * 16
    with FlopCounterMode(display=False) as counter:
        fastattn.linear_relu(q, w).sum().backward()
    assert counter.get_total_flops() == 3 * rows * 4 * 8
    with FlopCounterMode(display=False) as counter:
        fastattn.mlp(q.detach(), [w, w2]).sum().backward()
    assert counter.get_total_flops() == rows * (2 * 4 * 8 + 3 * 2 * 4)
    starts = torch.tensor([0, 5, 16])
    packed = [torch.randn(16, 4, 8) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        fastattn.varlen_attn(*packed, starts, starts, 11, 11)
    assert counter.get_total_flops() == 2 * 2 * 4 * (5 * 5 + 11 * 11) * 8


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    def leaf(x):
        return x.clone().requires_grad_(requires_grad)

    shapes = ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 5), (1, 4, 1, 6))
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    tangents = [leaf(torch.randn_like(x)) for x in tensors]
    q, k, v, mask = map(leaf, tensors)
    slopes, numbers = torch.rand(4, dtype=torch.float64), (True, 0.5, 0.1, 4, -1, 0.7, 3, 3)
    namespace, check = torch.ops.fastattn, torch.library.opcheck

    def both(mask, tangents, seed, starts, inputs):
        given = (*inputs, mask, slopes, seed, *starts)
        arguments = (*given, *numbers)
        check(namespace.attention_forward.default, arguments)
        out, lse, *softmax = (x.detach() for x in namespace.attention_forward(*arguments))
        needs = [True, True, True, mask is not None]
        cotangents = leaf(out), leaf(lse)
        check(
            namespace.attention_backward.default,
            (*cotangents, *given, out, *softmax, *numbers, needs),
        )
        arguments = (*given, *tangents, out, *softmax, *numbers)
        check(namespace.attention_jvp.default, arguments)
        if starts[0] is not None and requires_grad:
            return  # a third derivative reads where the sequences start, which no graph can
        check(
            namespace.attention_double_backward.default,
            (*cotangents, *arguments, [True, *needs]),
        )

    both(mask, tangents, torch.tensor([1]), (None, None), (q, k, v))
    packed = [leaf(x.detach()[:1, :, :3]) for x in (q, k, v)]
    tangents = [leaf(torch.randn_like(x)) for x in packed]
    both(None, [*tangents, None], torch.tensor([1, 2]), [torch.tensor([0, 2, 3])] * 2, packed)
    w, x, b = leaf(torch.randn(9, 3)), leaf(torch.randn(2, 4, 3)), leaf(torch.randn(9))
    check(namespace.linear_relu_forward.default, (x, w, None))
    _, bits = namespace.linear_relu_forward(x, w, None)
    grad_out, t_x, t_w = leaf(torch.randn(2, 4, 9)), leaf(torch.randn(2, 4, 3)), leaf(w.detach())
    check(namespace.linear_relu_backward.default, (grad_out, x, w, bits, [True] * 3))
    check(namespace.linear_relu_jvp.default, (x, w, bits, t_x, t_w, None))
    check(namespace.mlp_forward.default, (x, [w], [b]))
    check(namespace.mlp_inference.default, (x, [w], [b]))


def test_ops_called_directly_are_differentiable():
    leaves = inputs(dtype=torch.float64)
    call = (None, *ops.Extras(), *ops.Options(is_causal=True, scale=0.3))

    def direct(q, k, v):
        return torch.ops.fastattn.attention_forward(q, k, v, *call)[0].sin().sum()

    def oracle(q, k, v):
        return reference.attention(q, k, v, is_causal=True, scale=0.3)[0].sin().sum()

    seconds = [second_derivatives(f, leaves) for f in (direct, oracle)]
    torch.testing.assert_close(*seconds)
    with pytest.raises(NotImplementedError, match="attention_forward: torch.func does not reach"):
        grad(direct)(*(x.detach() for x in leaves))
    x, w = torch.randn(3, 5), torch.randn(4, 5)
    out = torch.ops.fastattn.mlp_forward(x, [w.requires_grad_()], [torch.zeros(4)])[0]
    (dw,) = torch.autograd.grad(out.sum(), w)
    torch.testing.assert_close(dw, x.sum(0).expand(4, 5))


def test_the_mlps_backward_op_is_not_differentiated_in_silence():
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    dx, _, _ = ops.mlp_backward(torch.ones(3, 4), x, [w.requires_grad_()], [], [True, True, False])
    with pytest.raises(RuntimeError, match="mlp_backward has no derivative"):
        dx.sum().backward()


def test_autocast():
    q, k, v = (x.detach() for x in inputs())
    w = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert fastattn.linear_relu(q, w).dtype == torch.bfloat16
        assert fastattn.mlp(q, [w]).dtype == torch.bfloat16
        out, tangent = jvp(fastattn.scaled_dot_product_attention, (q, k, v), (q, k, v))
        assert out.dtype == tangent.dtype == torch.bfloat16

        def loss(q):
            return fastattn.scaled_dot_product_attention(q, k, v).float().square().sum()

        first, second = jvp(grad(loss), (q,), (q,))
        assert first.dtype == second.dtype == torch.float32
    exact = jvp(grad(loss), (q,), (q,))[1]
    # A few results on the way, each rounded to bfloat16.
    assert (second - exact).abs().max() < 16 * unit_roundoff(torch.bfloat16) * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_tensors_of_several_dtypes(dtype):
    """Rotary embeddings leave q and k in float32 beside a 16-bit v; torch's own casts all three."""
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    mask = torch.randn(9, 9)
    x, w1, w2, b1 = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 5), torch.randn(5)
    packed = [x[0].transpose(0, 1) for x in (q, k, v.to(dtype))]
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    leaf = v.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = fastattn.scaled_dot_product_attention(q, k, leaf, mask)
        expected = F.scaled_dot_product_attention(q, k, v.to(dtype), mask)
        ragged = fastattn.varlen_attn(*packed, starts, starts, 5, 5)
        hidden = fastattn.linear_relu(x.to(dtype), w1, b1)
        whole = fastattn.mlp(x.to(dtype), [w1, w2.to(dtype)], [b1, None])
        with pytest.raises(TypeError, match="key: expected a tensor"):
            fastattn.scaled_dot_product_attention(q, None, v)
        with pytest.raises(ValueError, match="weight 1: expected in_features"):
            fastattn.mlp(x, [w1, w1])  # the words name the fault, not the dtype before the cast
    assert out.dtype == expected.dtype == ragged.dtype == hidden.dtype == whole.dtype == dtype
    tolerance = {"rtol": 0.0, "atol": 8 * unit_roundoff(dtype) * float(v.abs().max())}
    torch.testing.assert_close(out, expected, **tolerance)
    alone = F.scaled_dot_product_attention(q[0, :, :4], k[0, :, :4], v[0, :, :4])
    torch.testing.assert_close(ragged[:4].transpose(0, 1).float(), alone, **tolerance)
    out.float().sum().backward()
    assert leaf.grad.dtype == dtype
    with pytest.raises(TypeError, match="value: expected query's dtype torch.float32"):
        fastattn.scaled_dot_product_attention(q, k, v.to(dtype))
    with pytest.raises(TypeError, match="weight: expected input's dtype"):
        fastattn.linear_relu(x.to(dtype), w1)


def test_derivatives_in_autocast_keep_their_dtype():
    """A float32 graph that is differentiated inside an autocast region."""
    q, k, v = inputs()
    w, w2 = weights()

    def third(context):
        x = fastattn.scaled_dot_product_attention(q, k, v)
        with context:
            for _ in range(3):
                (x,) = torch.autograd.grad(x.sin().sum(), q, create_graph=True)
        y = fastattn.mlp(q, [w, w2])
        with context:
            (g,) = torch.autograd.grad(y, w, y.detach().sin(), create_graph=True)
        return x, g, *torch.autograd.grad(g.sin().sum(), w2)

    outside = third(torch.autocast("cpu", enabled=False))
    torch.testing.assert_close(third(torch.autocast("cpu", dtype=torch.bfloat16)), outside)


def test_flops_of_fake_packed_sequences():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        packed = [torch.randn(1, 4, 16, 8) for _ in range(3)]
        starts = torch.tensor([0, 5, 16])
        call = (None, *ops.Extras(starts_q=starts, starts_k=starts), *ops.Options())
        torch.ops.fastattn.attention_forward(*packed, *call)
    assert counter.get_total_flops() == 2 * 2 * 4 * 16 * 16 * 8
