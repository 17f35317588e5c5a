"""Random small models, each part drawn by name and counted, so that a test knows what it met."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

# Kernels take a 16-bit product of 16 rows and 32 columns or more.
WIDTHS = {torch.float64: 6, torch.float32: 6, torch.float16: 32, torch.bfloat16: 32}
ROWS = 8  # of each of two batch elements


@dataclass
class Draw:
    """Random choices, and how often each was taken."""

    rng: random.Random
    width: int = 6
    seen: Counter[str] = field(default_factory=Counter)

    def one_of(self, what: str, names: Iterable[str], weights: dict[str, int] | None = None) -> str:
        names = list(names)
        (name,) = self.rng.choices(names, [(weights or {}).get(n, 1) for n in names])
        self.seen[f"{what}: {name}"] += 1
        return name

    def chance(self, what: str, p: float) -> bool:
        taken = self.rng.random() < p
        self.seen[what] += taken
        return taken


class Adapter(nn.Module):
    """Low-rank weights around a layer, as LoRA puts them."""

    def __init__(self, base: nn.Module, width: int) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(width, 2), nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class FeedForward(nn.Module):
    """A block whose forward patch knows by its code."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.act, self.drop = activation, Drops(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


class Calling(FeedForward):
    """The same with a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.up(x))
        return self.down(x)


class Attends(nn.Module):
    """Attention with its weights as a side effect, and masks."""

    def __init__(self, attention: nn.MultiheadAttention, need_weights: bool, masked: str) -> None:
        super().__init__()
        self.attention, self.need_weights, self.masked = attention, need_weights, masked
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        masks = masks_of(self.masked, x, "key_padding_mask", "attn_mask")
        # Batch first or not, the sequences are the rows that lie along the masks.
        y, weights = self.attention(x, x, x, need_weights=self.need_weights, **masks)
        return x + y if weights is None else x + y * weights.square().sum().to(y.dtype)


class Encodes(nn.Module):
    """An encoder, or one layer of it, with masks."""

    def __init__(self, encoder: nn.Module, masked: str) -> None:
        super().__init__()
        self.encoder, self.masked = encoder, masked

    def forward(self, x: Tensor) -> Tensor:
        whole = isinstance(self.encoder, nn.TransformerEncoder)
        return self.encoder(
            x, **masks_of(self.masked, x, "src_key_padding_mask", "mask" if whole else "src_mask")
        )


MASKED = ("no", "padding", "causal", "both", "bias")


def masks_of(masked: str, x: Tensor, padding: str, mask: str) -> dict[str, Tensor]:
    given = {}
    if masked in ("padding", "both"):
        given[padding] = torch.zeros(x.shape[:2], dtype=torch.bool)
        given[padding][1, -2:] = True
    if masked in ("causal", "both"):
        given[mask] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    if masked == "bias":
        given[mask] = torch.linspace(0, 1, x.shape[1] ** 2, dtype=x.dtype).view(x.shape[1], -1)
    return given


class Net(nn.Module):
    """A forward of its own with a branch, side outputs and a second method."""

    def __init__(self, parts: list[nn.Module], taps: set[int], shared: nn.Linear) -> None:
        super().__init__()
        self.parts, self.shared = nn.ModuleList(parts), shared
        self.taps, self.early = taps, False

    def features(self, x: Tensor) -> Tensor:
        return self.shared(x)

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden = self.shared(x)
        out = [hidden]
        if extra is None:
            hidden = torch.relu(hidden)
        for i, part in enumerate(self.parts):
            hidden = part(hidden)
            if i in self.taps:
                out.append(hidden)
            if self.early and i == 1:
                break
        return (*out, hidden if extra is None else hidden + extra)


class Symmetric(nn.Module):
    """A parametrization of a square weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


# --- parts ----------------------------------------------------------------------------------------

BETWEEN: dict[str, Callable[[], list[nn.Module]]] = {
    "ReLU": lambda: [nn.ReLU()],
    "ReLU in place": lambda: [nn.ReLU(True)],
    "ReLU6": lambda: [nn.ReLU6()],
    "GELU": lambda: [nn.GELU()],
    "Dropout": lambda: [nn.ReLU(), nn.Dropout(0.3)],
    "nothing": lambda: [],
}


def stretch(draw: Draw, shared: nn.Linear) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(draw.rng.randint(1, 3)):
        layers.append(
            shared if draw.chance("a shared layer", 0.12) else nn.Linear(draw.width, draw.width)
        )
        layers += BETWEEN[draw.one_of("between", BETWEEN, {"ReLU": 6})]()
        if draw.chance("a Sequential inside", 0.1):
            layers.append(nn.Sequential(nn.Linear(draw.width, draw.width), nn.ReLU()))
    linears = [m for m in layers if isinstance(m, nn.Linear)]
    # A shared layer may be parametrized since an earlier stretch: it has no Parameter to tie.
    ends = linears[:1] + linears[-1:]
    free = len(linears) > 1 and not any(map(parametrize.is_parametrized, ends))
    if free and draw.chance("tied weights", 0.15):
        linears[-1].weight = linears[0].weight
    if draw.chance("parametrized before patch", 0.05):
        parametrize.register_parametrization(linears[0], "weight", Symmetric())
    if draw.chance("hooked before patch", 0.05):
        linears[-1].register_forward_hook(less_a_half)
    return nn.Sequential(*layers)


class Drops(nn.Dropout):
    """A dropout that no kernel stands in for: its random numbers are torch's."""


def feed_forward(draw: Draw) -> nn.Module:
    if draw.chance("a block that calls a function", 0.5):
        return Calling(draw.width, nn.Identity())
    return FeedForward(draw.width, draw.rng.choice((nn.ReLU(), nn.GELU(), nn.SiLU())))


def encoder_layer(draw: Draw) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        draw.width, 2, draw.width + 2, batch_first=True, dropout=draw.rng.choice((0.0, 0.0, 1.0)),
        norm_first=draw.chance("norm first", 0.5),
        activation=draw.rng.choice((F.relu, F.gelu, nn.ReLU())),
    )  # fmt: skip
    layer.self_attn.dropout = 0.0  # whose random numbers are fastattn's own
    if draw.chance("dropout of another kind", 0.3):
        layer.dropout, layer.dropout1, layer.dropout2 = Drops(0.3), Drops(0.3), Drops(0.3)
    return layer


def encodes(draw: Draw, layers: int) -> nn.Module:
    encoder: nn.Module = encoder_layer(draw)
    if layers > 1:
        nested = draw.chance("nested tensors at inference", 0.5)
        encoder = nn.TransformerEncoder(encoder, layers, enable_nested_tensor=nested)
    return Encodes(encoder, draw.one_of("encoder masked", MASKED))


def attends(draw: Draw) -> nn.Module:
    attention = nn.MultiheadAttention(
        draw.width, 2, batch_first=True, bias=draw.rng.random() < 0.8,
        add_bias_kv=draw.chance("added keys", 0.2), add_zero_attn=draw.rng.random() < 0.2,
    )  # fmt: skip
    weights = draw.chance("attention weights wanted", 0.4)
    return Attends(attention, weights, draw.one_of("attention masked", MASKED))


PARTS: dict[str, Callable[[Draw, nn.Linear], nn.Module]] = {
    "stretch": stretch,
    "encoder layer": lambda draw, shared: encodes(draw, 1),
    "encoder": lambda draw, shared: encodes(draw, 2),
    "attention": lambda draw, shared: attends(draw),
    "feed-forward": lambda draw, shared: feed_forward(draw),
    "adapter": lambda draw, shared: Adapter(nn.Linear(draw.width, draw.width), draw.width),
    "Linear": lambda draw, shared: nn.Linear(draw.width, draw.width),
}
DTYPES = {"float64": 14, "float32": 3, "float16": 2, "bfloat16": 1}


Parts = dict[str, Callable[[Draw, nn.Linear], nn.Module]]


def random_model(draw: Draw, more: Parts | None = None) -> tuple[Net, torch.dtype]:
    """A model of PARTS and ``more``, and its dtype."""
    made = {**PARTS, **(more or {})}
    torch.default_generator.manual_seed(draw.rng.randrange(2**31))
    dtype = getattr(torch, draw.one_of("dtype", DTYPES, DTYPES))
    draw.width = WIDTHS[dtype]
    shared = nn.Linear(draw.width, draw.width)
    parts = [
        made[draw.one_of("part", made, {"stretch": 7, **dict.fromkeys(more or {}, 2)})](
            draw, shared
        )
        for _ in range(draw.rng.randint(1, 3))
    ]
    taps = {i for i in range(len(parts)) if draw.chance("a side output", 0.3)}
    return Net(parts, taps, shared).to(dtype), dtype


# --- hooks, which a pickle must find by name ------------------------------------------------------


def less_a_half(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out - 0.5


def more_a_half(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.5, *args[1:])


def twice_the_gradient(module: nn.Module, inputs: object, outputs: object) -> tuple | None:
    return tuple(None if g is None else 2 * g for g in inputs)


class Twice:
    """A forward that somebody puts on an instance."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * x
