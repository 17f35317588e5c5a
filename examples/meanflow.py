"""MeanFlow on handwritten digits: a transformer that generates in one step.

Between noise e and an image x lies the path z = (1 - t) x + t e with velocity v = e - x. The
network learns the mean velocity u between two times r < t from the identity

    u = v - (t - r) du/dt,    du/dt = v d_z u + d_t u,

in which du/dt is one forward-mode pass, ``torch.func.jvp`` of the network in the direction
(v, 0, 1), through the fused attention and MLP. A sample is then e - u(e, 0, 1). (Geng et al. 2025,
"Mean flows for one-step generative modeling".)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import fastattn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, BATCH, EVERY = 64, 128, 50


class MeanVelocity(nn.Module):
    """The network u(z, r, t, digit); a token is a patch of 2x2 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(0.5 * torch.randn(16, WIDTH))
        self.times = fastattn.nn.MLP(32, WIDTH, WIDTH)
        self.digit = nn.Embedding(10, WIDTH)
        layer = fastattn.nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = fastattn.nn.TransformerEncoder(layer, 3, nn.LayerNorm(WIDTH))
        self.velocity = nn.Linear(WIDTH, 4)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, digit: Tensor) -> Tensor:
        """z ``[N, 16, 4]``, r and t ``[N]``, digit ``[N]`` -> ``[N, 16, 4]``."""
        frequencies = 2.0 ** torch.arange(-2, 6)
        angles = torch.cat([t[:, None] * frequencies, (t - r)[:, None] * frequencies], dim=1)
        condition = self.times(torch.cat([angles.sin(), angles.cos()], dim=1)) + self.digit(digit)
        x = self.patch(z) + self.position + condition[:, None]
        return self.velocity(self.encoder(x))


def to_patches(images: Tensor) -> Tensor:
    return images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)


def to_images(patches: Tensor) -> Tensor:
    return patches.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


def squared_error(net: MeanVelocity, x: Tensor, digit: Tensor) -> Tensor:
    """The squared error of u against its target, ``[N]``."""
    v = torch.randn_like(x) - x
    times = torch.sigmoid(torch.randn(2, len(x)) - 0.4)
    t, r = times.amax(0), times.amin(0)
    r = torch.where(torch.rand(len(x)) < 0.5, t, r)  # half of them plain flow matching
    point = (x + t[:, None, None] * v, r, t)
    direction = (v, torch.zeros_like(r), torch.ones_like(t))
    u, slope = torch.func.jvp(lambda *point: net(*point, digit), point, direction)
    target = v - (t - r)[:, None, None] * slope.detach()
    return (u - target).square().flatten(1).mean(1)


@torch.no_grad()
def sample(net: MeanVelocity, digit: Tensor) -> Tensor:
    """Images ``[N, 8, 8]``, by one evaluation of the network."""
    noise = torch.randn(len(digit), 16, 4)
    t = torch.ones(len(digit))
    return to_images(noise - net(noise, torch.zeros_like(t), t, digit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)

    data = load_digits()
    images = torch.from_numpy(data.images).float() / 8 - 1  # [1797, 8, 8], in -1..1
    digits = torch.from_numpy(data.target)
    judge = KNeighborsClassifier(5).fit(images.flatten(1), digits)
    wanted = torch.arange(10).repeat(30)

    def recognised(net: MeanVelocity) -> float:
        """The share of samples in which a classifier of real digits sees the wanted one."""
        return judge.score(sample(net, wanted).flatten(1), wanted)

    net = MeanVelocity()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps + 1)
    patches = to_patches(images)
    errors, accuracies = [], {0: recognised(net)}
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(patches), (BATCH,))
        error = squared_error(net, patches[rows], digits[rows])
        loss = (error / (error.detach() + 1e-2)).mean()  # large errors, which vary most, weigh less
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(error.mean().item())
        if step % EVERY == 0 or step == options.steps:
            accuracies[step] = recognised(net)

    few = slice(max(1, options.steps // 10))
    first, last = (torch.tensor(part[few]).mean() for part in (errors, errors[::-1]))
    print(f"squared error: {first:.2f} at first, {last:.2f} at last")
    before, *_, after = accuracies.values()
    print(f"one-step samples recognised as the wanted digit: {before:.0%} untrained, {after:.0%}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(range(1, options.steps + 1), errors, color="tab:blue", linewidth=0.8)
    left.set(title="Training", xlabel="step", ylabel="squared error of u", yscale="log")
    left.yaxis.label.set_color("tab:blue")
    share = left.twinx()
    share.plot(list(accuracies), list(accuracies.values()), "o-", color="tab:orange", markersize=3)
    share.set(ylabel="samples recognised as the wanted digit", ylim=(0, 1.03))
    share.yaxis.label.set_color("tab:orange")
    grid = sample(net, torch.arange(10).repeat(6)).reshape(6, 10, 8, 8)
    grid = nn.functional.pad(grid, (1, 1, 1, 1), value=-1.0)  # [6, 10, 10, 10]
    right.imshow(grid.transpose(1, 2).reshape(60, 100), cmap="gray_r", vmin=-1, vmax=1)
    right.set(title="One-step samples of the digits 0 to 9", xticks=[], yticks=[])
    figure.get_layout_engine().set(w_pad=0.12)
    path = options.output / "meanflow.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
