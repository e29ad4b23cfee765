"""Soundness of boxes through whole networks: random networks, random boxes, and points of the boxes evaluated in float64.

Layers of every kind, batch normalisation, pooling, dropout in evaluation, nested Sequentials and activations; weights from
1e-6 to 1e3, float32 and float64, radii from 0 to large. A sample is one network with one box. A point is outside if its
value misses the box by more than an enclosure of that value is wide, in which what solving to 1e-11 leaves open is allowed for.

    python benchmarks/boxes.py --samples 100000 --output benchmarks/results/boxes.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perron._files import write_json
from perron.cells import (
    Activate,
    Inject,
    MonotoneConvolution2d,
    MonotoneConvolutionStep,
    Refusal,
    VariationalDropout,
    affine_step,
)
from perron.constraints import nonnegative
from perron.nn import (
    DiagonalLowRank,
    Equilibrium,
    MonotoneConv2d,
    MonotoneLinear,
    PositiveConcaveConv1d,
    PositiveConcaveConv2d,
    PositiveConcaveLinear,
    SparseLinear,
    SubhomogeneousConv1d,
    SubhomogeneousConv2d,
    SubhomogeneousLinear,
    UnconstrainedConv2d,
    UnconstrainedLinear,
)
from perron.solvers import Auto
from perron.verify import Interval, propagate

T = TypeVar("T")

BATCH = 100
POINTS = 8
CONCAVE = [
    "tanh",
    "softsign",
    "relu6",
    "sigmoid",
    "one_minus_exp",
    "arctan",
    "erf",
    "log1p",
    "sqrt_shift",
    "(tanh+1.2)^0.5",
]
UNBOUNDED = ["relu", "identity"]
SHIFTED = ["tanh+1.2", "tanh+1.7", "softsign+1.5", "(sigmoid+0.1)^0.5", "(tanh+1.2)^0.3"]
SIGNED = ["tanh", "relu", "sigmoid", "softsign", "relu6", "arctan", "identity"]


class Draw:
    """Random numbers and choices of one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log(self, low: float, high: float) -> float:
        return 10 ** self.uniform(math.log10(low), math.log10(high))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def chance(self, p: float) -> bool:
        return self.uniform(0, 1) < p


def scaled(module: nn.Module, draw: Draw) -> nn.Module:
    """The module with the weights of an affine map, drawn at a random scale."""
    scale = draw.log(1e-6, 1e3) if draw.chance(0.5) else 1.0
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=draw.generator, dtype=torch.float64))
    return module


def equilibrium(draw: Draw, features: int, dims: int) -> nn.Module:
    """A layer that keeps (batch, features, *dims), of a random kind, with its input map inside or without."""
    solver = Auto(tol=draw.choice([1e-2, 1e-4, 1e-6]), max_steps=500, on_failure="ignore")
    options: dict[str, Any] = {"solver": solver, "injection": draw.choice(["inside", "pre"])}
    kind = draw.choice(["concave", "concave", "unbounded", "degree", "norm", "bounded", "monotone", "plain", "cell"])
    if kind in ("concave", "unbounded"):
        layer: Any = (PositiveConcaveLinear, PositiveConcaveConv1d, PositiveConcaveConv2d)[dims]
        name, radius = draw.choice(CONCAVE), draw.log(1e-3, 1e2)
        if kind == "unbounded":
            name, radius = draw.choice(UNBOUNDED), draw.uniform(0, 0.45)
        if name in ("log1p", "sqrt_shift"):
            radius = min(radius, 3.0)
        return layer(features, features, activation=name, initial_radius=radius, **options)
    if kind in ("degree", "norm", "bounded"):
        layer = (SubhomogeneousLinear, SubhomogeneousConv1d, SubhomogeneousConv2d)[dims]
        if kind == "norm":
            options |= {"normalize": draw.choice([2.0, math.inf]), "normalize_dim": draw.choice([None, 1])}
        # Twice the degree must be below 1 with a norm.
        name = draw.choice(["tanh+1.7", "(tanh+1.2)^0.3"] if kind == "norm" else SHIFTED)
        options["weights"] = "signed_bounded" if kind == "bounded" else "nonnegative"
        name = "tanh+1.2" if kind == "bounded" else name
        return layer(features, features, activation=name, initial_radius=draw.log(1e-2, 10), **options)
    if kind == "monotone" and dims != 1:
        layer = (MonotoneLinear, None, MonotoneConv2d)[dims]
        return layer(features, features, activation=draw.choice(SIGNED), margin=draw.log(0.05, 3), **options)
    if kind == "plain" and dims != 1:
        layer = (UnconstrainedLinear, None, UnconstrainedConv2d)[dims]
        return layer(features, features, activation=draw.choice(SIGNED), initial_radius=draw.uniform(0, 0.6), **options)
    if dims:
        return PositiveConcaveConv1d(features, features, **options) if dims == 1 else nn.Identity()
    return cell(draw, features, solver)


def cell(draw: Draw, features: int, solver: Auto) -> Equilibrium:
    """A layer around a cell of several steps."""
    edges = (torch.rand(features, features, generator=draw.generator) < 0.5).nonzero().t()
    maps = [
        nonnegative(nn.Linear(features, features, bias=draw.chance(0.5))),
        nonnegative(SparseLinear(edges, features)),
        DiagonalLowRank(features, 1, bias=draw.chance(0.5)),
    ]
    steps = [draw.choice(maps), Inject(), Activate(draw.choice(CONCAVE))]
    if draw.chance(0.3):
        steps = [nonnegative(nn.Linear(features, features)), Activate(draw.choice(CONCAVE)), *steps]
    if draw.chance(0.3):
        steps.insert(0, VariationalDropout(0.5))
    return Equilibrium(nn.Sequential(*steps), injection="softplus", solver=solver)


def norm(draw: Draw, features: int, dims: int) -> nn.Module:
    """Batch normalisation as training may have left it."""
    layer: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dims]
    module = layer(features, eps=draw.choice([1e-5, 1e-3]), affine=draw.chance(0.7))
    shape = (features,)
    module.running_mean.copy_(torch.randn(shape, generator=draw.generator) * draw.log(1e-3, 10))
    module.running_var.copy_(10 ** (6 * torch.rand(shape, generator=draw.generator) - 4))
    if module.affine:
        with torch.no_grad():
            module.weight.copy_(torch.randn(shape, generator=draw.generator))
            module.bias.copy_(torch.randn(shape, generator=draw.generator))
    return module


def between(draw: Draw, features: int, dims: int) -> nn.Module:
    """What may stand between two maps and keeps the number of features."""
    options: list[nn.Module] = [
        nn.Identity(),
        nn.Tanh(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.Sigmoid(),
        nn.Softsign(),
        nn.LeakyReLU(draw.uniform(0, 2)),
        nn.Softplus(draw.log(0.1, 10), draw.uniform(-1, 20)),
        Activate(draw.choice(["arctan", "erf", "tanh+1.2"])),
        nn.Dropout(0.5),
        norm(draw, features, dims),
        norm(draw, features, dims),
        nn.Sequential(norm(draw, features, dims), nn.Sequential(nn.Dropout(), nn.Tanh())),
    ]
    return draw.choice(options)


def random_network(draw: Draw) -> tuple[nn.Module, tuple[int, ...]]:
    """A network in evaluation mode, and the shape of one input."""
    dims = draw.choice([0, 0, 0, 1, 2])
    first, width, classes = draw.integer(1, 5), draw.integer(1, 6), draw.integer(1, 4)
    side = draw.integer(4, 6)
    if not dims:
        parts = [
            scaled(nn.Linear(first, width), draw),
            between(draw, width, 0),
            equilibrium(draw, width, 0),
            between(draw, width, 0),
            *([equilibrium(draw, width, 0)] if draw.chance(0.2) else []),
            scaled(nn.Linear(width, classes), draw),
        ]
        return assemble(draw, parts), (first,)
    convolution: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
    width = min(width, 3)
    pools: list[Any] = [
        (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](3, stride=draw.integer(1, 2), padding=1, ceil_mode=draw.chance(0.5)),
        (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](2, stride=1, dilation=2),
        (nn.AvgPool1d, nn.AvgPool2d)[dims - 1](
            2, padding=draw.integer(0, 1), ceil_mode=draw.chance(0.5), count_include_pad=draw.chance(0.5)
        ),
    ]
    head = [
        scaled(convolution(min(first, 2), width, 3, padding=draw.choice([1, "same"]), bias=draw.chance(0.7)), draw),
        between(draw, width, dims),
        equilibrium(draw, width, dims),
        draw.choice(pools),
        between(draw, width, dims),
        nn.Flatten(),
    ]
    shape = (min(first, 2), *[side] * dims)
    with torch.no_grad():
        entries = nn.Sequential(*head[:1], head[3], head[5]).eval()(torch.zeros(1, *shape)).shape[1]
    return assemble(draw, [*head, scaled(nn.Linear(entries, classes), draw)]), shape


def assemble(draw: Draw, parts: list[nn.Module]) -> nn.Module:
    """A Sequential, sometimes of Sequentials."""
    if draw.chance(0.3):
        cut = draw.integer(1, len(parts) - 1)
        parts = [nn.Sequential(*parts[:cut]), nn.Sequential(*parts[cut:])]
    return nn.Sequential(*parts).to(draw.choice([torch.float32, torch.float64])).eval()


def random_boxes(draw: Draw, shape: tuple[int, ...]) -> Interval:
    """Boxes of all sizes, float64: radii from 0 to 10, of one entry alone or of all."""

    def like(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((BATCH, *shape), generator=draw.generator, dtype=torch.float64)

    each = (BATCH, *[1] * len(shape))
    exponent = torch.rand(each, generator=draw.generator, dtype=torch.float64) * 13 - 12
    radius = 10**exponent * like(0, 1)
    radius = radius * (torch.rand(each, generator=draw.generator) > 0.1) * (like(0, 1) < draw.choice([1.0, 0.3]))
    centre = draw.log(1e-3, 1e2) * like(-1, 1)
    return Interval(centre - radius, centre + radius)


def points_of(draw: Draw, box: Interval) -> Tensor:
    """(POINTS, batch, ...): both ends, the centre, random corners, random points."""
    random = torch.rand((POINTS - 3, *box.lower.shape), generator=draw.generator, dtype=torch.float64)
    random[::2] = random[::2].round()
    share = torch.cat(
        [torch.tensor([0.0, 1.0, 0.5]).double().reshape(-1, *[1] * box.lower.dim()).expand(3, *box.lower.shape), random]
    )
    return (box.lower + share * (box.upper - box.lower)).clamp(box.lower, box.upper)


def in_float64(net: nn.Module) -> nn.Module:
    """The network with the very weights it has, in float64 and solved closely; what makes its weights is taken away."""
    for module in net.modules():
        if isinstance(module, MonotoneConvolution2d):
            keep_as_multiplied(module)
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type, union-attr]
                parametrize.remove_parametrizations(module, name)
        if isinstance(module, Equilibrium):
            module.solver = Auto(tol=1e-11, max_steps=2000, on_failure="ignore")
    return net.double()


def keep_as_multiplied(module: MonotoneConvolution2d) -> None:
    """Choose b and the margin so that they give the kernel and the multiple of I of the present precision in float64, too."""
    step = affine_step(module)
    assert isinstance(step, MonotoneConvolutionStep)
    # A difference and a half of it are exact here.
    module.b.data, module.margin = step.weights[1].detach() / 2, 1 - step.identity


def leaves(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [leaf for child in module for leaf in leaves(child)]
    return [module]


def evaluate(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network's values in float64, how far each may be from exact, and whether all equilibria were solved, (batch,)."""
    value, box, solved = x.clone(), Interval(x, x), torch.ones(len(x), dtype=torch.bool)
    for module in leaves(net):
        value, box = module(value), propagate(module, box)
        if isinstance(module, Equilibrium):
            assert module.last_solution is not None
            solved &= module.last_solution.converged
            # Both the exact value and the one that goes on, unless the layer is off by more than it says.
            reach = 1e-9 * value.flatten(1).abs().amax(1).reshape(-1, *[1] * (value.dim() - 1))
            lower, upper = torch.maximum(value, box.lower - reach), torch.minimum(value, box.upper + reach)
            box = Interval(torch.minimum(box.lower, lower), torch.maximum(box.upper, upper))
    return value, box.upper - box.lower, solved & (box.upper - box.lower).isfinite().all(1)


@torch.no_grad()
def measure(samples: int, seed: int = 0) -> dict[str, int]:
    draw = Draw(torch.Generator().manual_seed(seed))
    # Layers draw their weights from the global generator.
    torch.manual_seed(seed)
    counts = dict.fromkeys(["samples", "networks", "refused", "bounded", "points", "outside", "inverted"], 0)
    while counts["samples"] < samples:
        net, shape = random_network(draw)
        box = random_boxes(draw, shape)
        counts["samples"] += BATCH
        counts["networks"] += 1
        try:
            found = propagate(net, box)
        except Refusal:
            counts["refused"] += BATCH
            continue
        value, slack, solved = evaluate(in_float64(net), points_of(draw, box).flatten(0, 1))
        value, slack = value.view(POINTS, BATCH, -1), slack.view(POINTS, BATCH, -1)
        bounded = ~found.lower.isnan() & ~found.upper.isnan()
        known = solved.view(POINTS, BATCH, 1) & bounded
        missed = torch.maximum(found.lower - value, value - found.upper) > slack
        counts["bounded"] += int(bounded.all(1).sum())
        counts["inverted"] += int((found.lower > found.upper).any(1).sum())
        counts["points"] += int(known.any(2).sum())
        outside = int((missed & known).any(2).sum())
        if outside and not counts["outside"]:
            print(f"network {counts['networks']} of seed {seed}: {net}", file=sys.stderr)
        counts["outside"] += outside
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.samples, arguments.seed)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)
    return int(bool(result["outside"] or result["inverted"]))


if __name__ == "__main__":
    sys.exit(main())
