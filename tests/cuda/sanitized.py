"""Small calls for compute-sanitizer: tails, masks, groups, two tiles a block."""

import itertools

import torch

from fastattn import linear_relu, mlp, scaled_dot_product_attention

for dim in (64, 128):
    q = torch.randn(1, 4, 200, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    k, v = (
        torch.randn(1, 2, 300, dim, dtype=q.dtype, device="cuda", requires_grad=True) for _ in "kv"
    )
    keys = torch.rand(1, 1, 1, 300, device="cuda") > 0.3
    for mask, causal in ((None, False), (None, True), (keys, False)):
        out = scaled_dot_product_attention(
            q, k, v, mask, 0.0, causal, enable_gqa=True, backend="cuda"
        )
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
for m, k, n in ((150, 200, 300), (600, 33, 19)):
    x, w = (torch.randn(r, k, dtype=q.dtype, device="cuda", requires_grad=True) for r in (m, n))
    b = torch.randn(n, dtype=q.dtype, device="cuda", requires_grad=True)
    out = linear_relu(x, w, b, backend="cuda")
    torch.autograd.grad(out.float().square().sum(), (x, w, b))
widths = (784, 128, 10)
weights = [
    torch.randn(n, k, dtype=q.dtype, device="cuda", requires_grad=True)
    for k, n in itertools.pairwise(widths)
]
out = mlp(torch.randn(100, 784, dtype=q.dtype, device="cuda"), weights, backend="cuda")
torch.autograd.grad(out.float().square().sum(), weights)
torch.cuda.synchronize()
print("done")
