"""WGAN-GP on handwritten digits with an attention critic.

The gradient penalty differentiates the critic's gradient: a double backward through the attention.
torch's fused attention has no double backward, so torch's layers run on SDPA's math path, which
stores every score. fastattn's layers stay fused. (Gulrajani et al. 2017, "Improved training of
Wasserstein GANs".)
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE, BATCH, EVERY = 32, 64, 50
CRITIC_STEPS, PENALTY = 3, 10.0
PAIRS, COMPARED_STEPS, TOLERANCE = 20, 5, 1e-3  # of losses in float32, which drift apart later


class Critic(nn.Module):
    """A score of an image as a digit; a token is a square of ``side`` x ``side`` pixels."""

    def __init__(self, layer: type[nn.TransformerEncoderLayer], side: int, width: int = 32) -> None:
        super().__init__()
        tokens = (8 // side) ** 2
        self.patches = nn.Unfold(side, stride=side)
        self.patch = nn.Linear(side**2, width)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.digit = nn.Embedding(10, width)
        self.encoder = layer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.score = nn.Linear(tokens * width, 1)

    def forward(self, images: Tensor, digit: Tensor) -> Tensor:
        """``[N, 8, 8]`` -> ``[N]``."""
        tokens = self.patches(images[:, None]).transpose(1, 2)  # [N, tokens, pixels]
        x = self.patch(tokens) + self.position + self.digit(digit)[:, None]
        return self.score(self.encoder(x).flatten(1))[:, 0]


def generate(generator: nn.Module, digit: Tensor) -> Tensor:
    """Images ``[N, 8, 8]`` in 0..1."""
    inputs = torch.cat([torch.randn(len(digit), NOISE), F.one_hot(digit, 10)], dim=1)
    return generator(inputs).sigmoid().unflatten(1, (8, 8))


def critic_loss(critic: Critic, real: Tensor, fake: Tensor, digit: Tensor) -> tuple[Tensor, ...]:
    """The loss, the Wasserstein estimate and the penalty."""
    mix = torch.rand(len(real), 1, 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between, digit).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    distance = (critic(real, digit) - critic(fake, digit)).mean()
    return PENALTY * penalty - distance, distance, penalty


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.0, 0.9))


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def compare(side: int, images: Tensor, digits: Tensor) -> None:
    """Times critic steps of torch's layers on the math path and of fastattn's, in pairs."""
    critics = [Critic(kind.TransformerEncoderLayer, side) for kind in (nn, fastattn.nn)]
    critics[1].load_state_dict(critics[0].state_dict())
    optimizers = [adam(critic) for critic in critics]
    paths = (lambda: sdpa_kernel(SDPBackend.MATH), contextlib.nullcontext)
    ratios, differences = [], []
    for pair in range(PAIRS):
        rows = torch.randint(len(images), (BATCH,))
        fake, state = torch.rand(BATCH, 8, 8), torch.get_rng_state()
        losses, seconds = [0.0, 0.0], [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            torch.set_rng_state(state)
            start = time.perf_counter()
            with paths[which]():
                loss, *_ = critic_loss(critics[which], images[rows], fake, digits[rows])
                step(optimizers[which], loss)
            losses[which], seconds[which] = loss.item(), time.perf_counter() - start
        ratios.append(seconds[0] / seconds[1])
        differences.append(abs(losses[0] - losses[1]))
    worst = max(differences[:COMPARED_STEPS])
    print(
        f"{(8 // side) ** 2} tokens: a critic step on the math path takes "
        f"{statistics.median(ratios):.2f}x fastattn's time; the first {COMPARED_STEPS} losses "
        f"agree to {worst:.0e}, tolerance {TOLERANCE:.0e}"
    )
    if not worst <= TOLERANCE:
        raise SystemExit("the losses disagree")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of the generator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    data = load_digits()
    images, digits = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    for side in (2, 1):
        compare(side, images, digits)

    judge = KNeighborsClassifier(5).fit(images.flatten(1), digits)
    wanted = torch.arange(10).repeat(30)
    critic = Critic(fastattn.nn.TransformerEncoderLayer, side=2)
    generator = fastattn.nn.MLP(NOISE + 10, [128, 128], 64)
    optimizers = adam(critic), adam(generator)

    def recognised() -> float:
        """The share of images in which a classifier of real digits sees the wanted one."""
        return judge.score(generate(generator, wanted).detach().flatten(1), wanted)

    distances, penalties, accuracies = [], [], {0: recognised()}
    for done in range(1, options.steps + 1):
        for _ in range(CRITIC_STEPS):
            rows = torch.randint(len(images), (BATCH,))
            fake = generate(generator, digits[rows]).detach()
            loss, distance, penalty = critic_loss(critic, images[rows], fake, digits[rows])
            step(optimizers[0], loss)
        step(optimizers[1], -critic(generate(generator, digits[rows]), digits[rows]).mean())
        distances.append(distance.item())
        penalties.append(penalty.item())
        if done % EVERY == 0 or done == options.steps:
            accuracies[done] = recognised()

    before, *_, after = accuracies.values()
    print(f"Wasserstein estimate: {max(distances):.2f} at most, {distances[-1]:.2f} at last")
    print(f"generated images recognised as the wanted digit: {before:.0%} untrained, {after:.0%}")

    figure, axes = plt.subplot_mosaic(
        "dg;pg;ag", figsize=(11, 6), width_ratios=(1, 1.1), layout="constrained"
    )
    axes["d"].plot(distances, linewidth=0.8)
    axes["d"].set(title="Training", ylabel="Wasserstein\nestimate")
    axes["p"].plot(penalties, linewidth=0.8, color="tab:green")
    axes["p"].set(ylabel="gradient\npenalty", yscale="log")
    axes["a"].plot(list(accuracies), list(accuracies.values()), "o-", color="tab:orange")
    axes["a"].set(ylabel="recognised as\nthe wanted digit", ylim=(0, 1.03), xlabel="generator step")
    real = [images[digits == n][:4] for n in range(10)]
    fake = generate(generator, torch.arange(10).repeat(4)).detach().unflatten(0, (4, 10))
    pairs = torch.cat([torch.stack(real, dim=1), fake])  # [8, 10, 8, 8]
    grid = F.pad(pairs, (1, 1, 1, 1)).transpose(1, 2).reshape(80, 100)
    axes["g"].imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    axes["g"].axhline(39.5, color="tab:red", linewidth=1)
    axes["g"].set(title="Real digits above, generated ones below", xticks=[], yticks=[])
    path = options.output / "gradient_penalty.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
