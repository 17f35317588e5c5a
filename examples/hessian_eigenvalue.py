"""The largest eigenvalue of the loss's Hessian while a transformer learns handwritten digits.

Gradient descent with learning rate h diverges where the curvature passes 2/h. In practice training
first sharpens the loss until its curvature reaches 2/h, and then stays there: the edge of stability
(Cohen et al. 2021). Power iteration needs only Hessian-vector products. Each is a jvp of the
gradient, forward mode over reverse mode, through the fused attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp

import fastattn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Parameters = dict[str, Tensor]

LEARNING_RATES = (0.1, 0.03)
IMAGES = 256  # to learn from, all in each step
EVERY = 5  # steps between measurements
TOLERANCE = 0.02  # of the eigenvalue, relative
MOST_ITERATIONS = 30


class Classifier(nn.Module):
    """A transformer that classifies images; a token is a row of the image."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.row = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        layer = fastattn.nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
        )
        self.encoder = fastattn.nn.TransformerEncoder(layer, 2, nn.LayerNorm(width))
        self.digit = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 8, 8]`` -> ``[N, 10]``."""
        return self.digit(self.encoder(self.row(images) + self.position).mean(1))


def dot(a: Parameters, b: Parameters) -> Tensor:
    return sum((a[name] * b[name]).sum() for name in a)


def scaled(a: Parameters, factor: Tensor) -> Parameters:
    return {name: factor * x for name, x in a.items()}


def hvp(loss: Callable[[Parameters], Tensor], at: Parameters, v: Parameters) -> Parameters:
    """The Hessian of ``loss`` times v."""
    return jvp(grad(loss), (at,), (v,))[1]


def largest_eigenvalue(
    loss: Callable[[Parameters], Tensor], at: Parameters, v: Parameters
) -> tuple[float, Parameters]:
    """The eigenvalue of largest size, and its eigenvector; v is where to start."""
    found = 0.0
    for _ in range(MOST_ITERATIONS):
        v = scaled(v, dot(v, v).rsqrt())
        product = hvp(loss, at, v)
        former, found = found, dot(v, product).item()
        v = product
        if abs(found - former) <= TOLERANCE * abs(found):
            break
    return found, v


def disagreement(loss: Callable[[Parameters], Tensor], at: Parameters, v: Parameters) -> float:
    """The relative difference of the product from the one by reverse mode over reverse mode."""
    slope = grad(lambda at: dot(grad(loss)(at), v))(at)
    product = hvp(loss, at, v)
    difference = {name: slope[name] - x for name, x in product.items()}
    return (dot(difference, difference) / dot(product, product)).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="for each learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    data = load_digits()
    images, digits = torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)
    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=(1, 2), layout="constrained"
    )
    for rate, color in zip(LEARNING_RATES, ("tab:blue", "tab:orange"), strict=True):
        torch.manual_seed(options.seed)
        model = Classifier()

        def loss(at: Parameters, model: nn.Module = model) -> Tensor:
            scores = functional_call(model, at, (images[:IMAGES],))
            return nn.functional.cross_entropy(scores, digits[:IMAGES])

        at = {name: x.detach().clone() for name, x in model.named_parameters()}
        v = {name: torch.randn_like(x) for name, x in at.items()}
        if rate == LEARNING_RATES[0]:
            print(
                f"forward over reverse and reverse over reverse: Hessian-vector products agree "
                f"to {disagreement(loss, at, v):.0e}"
            )
        losses, sharpness = [], {}
        for step in range(options.steps):
            if step % EVERY == 0:
                sharpness[step], v = largest_eigenvalue(loss, at, v)
            slope, value = grad_and_value(loss)(at)
            losses.append(value.item())
            at = {name: x - rate * slope[name] for name, x in at.items()}
        with torch.no_grad():
            guesses = functional_call(model, at, (images[IMAGES:],)).argmax(1)
        accuracy = (guesses == digits[IMAGES:]).float().mean()
        values = list(sharpness.values())
        print(
            f"learning rate {rate}: loss {losses[0]:.2f} -> {losses[-1]:.2f}, held-out accuracy "
            f"{accuracy:.1%}; largest eigenvalue {values[0]:.1f} at first, then (median of the "
            f"second half) {median(values[len(values) // 2 :]):.1f}, and 2/h is {2 / rate:.1f}"
        )
        upper.plot(losses, color=color, label=f"learning rate {rate}")
        lower.plot(list(sharpness), values, "o-", color=color, markersize=3)
        lower.axhline(2 / rate, color=color, linestyle="--", label=f"2 / {rate}")
    upper.set(title="Gradient descent finds the edge of stability", ylabel="training loss")
    upper.legend()
    lower.set(xlabel="step", ylabel="largest eigenvalue of the Hessian", yscale="log")
    lower.legend()
    path = options.output / "hessian_eigenvalue.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
