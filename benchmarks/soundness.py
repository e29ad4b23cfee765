"""Soundness and tightness of everything that is proven about a solve, on random cells of ten families.

Enclosures and error bounds of every solver, from every kind of guess; those of `perron.enclose` around every
kind of candidate; and bounds of adjoints. Small cells are judged by fixed points in several hundred bits
(`benchmarks/exact.py`), down to subnormal numbers and up to spectral radii of 1 - 1e-12; wide ones by Picard and Newton
in float64. What is proven is a miss if the truth contradicts it by more than the truth's own error. The bound of an
adjoint is read in the norm that it was proven in: the weights are derived again from the enclosure, as the solver did;
whatever they are, on one unknown the norm drops out.

    python benchmarks/soundness.py --samples 200000 --workers 2 --output benchmarks/results/soundness.json
    python benchmarks/soundness.py --seed 0 --only 1234      the cell of that number, its problem in full precision
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import draw
import mpmath
import torch
from exact import ExactCell, Truth, channel_product, numbers, radius
from torch import Tensor, nn

from perron import enclose
from perron._files import write_json
from perron.activations import ACTIVATIONS
from perron.cells import Activate, Chain, DiagonalLowRank, Inject, Map, Normalize, Refusal, SparseLinear, trace
from perron.constraints import BoundedRows, MonotoneOperator
from perron.nn import Equilibrium, MonotoneConv2d, MonotoneLinear
from perron.solvers import (
    AdjointSolution,
    Anderson,
    Auto,
    Broyden,
    FixedPointProblem,
    IterativeSolver,
    Newton,
    OperatorSplitting,
    Picard,
    Solution,
    adjoint,
)
from perron.solvers.aggregation import Aggregation
from perron.theory import PositiveConcave, Sign, Theory, derive
from perron.theory.weighted_norm import WeightedNormBound

BATCH = 10
SUPREMA = [a.name for a in ACTIVATIONS.values() if a.bounded]
LINEAR = ("relu", "identity")
SUBLINEAR = ("log1p", "sqrt_shift")
COMPOSITES = (
    "tanh+1.2",
    "(tanh+1.2)^0.5",
    "sigmoid^0.5",
    "softsign+1e-8".replace("1e-8", "0.00000001"),
    "log1p+0.5",
    "relu+0.3",
    "(identity+0.1)^0.9",
    "arctan+1.7",
    "one_minus_exp+0.01",
    "(erf+0.001)^0.3",
)
SHIFTED = ("tanh+1.2", "tanh+1.05", "softsign+1.1", "sigmoid", "(tanh+1.2)^0.5", "arctan+1.7", "relu6+0.5")
MONOTONE = ("relu", "tanh", "sigmoid", "softsign", "arctan", "relu6", "identity")


# ------------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Problem:
    """A layer with a batch of inputs.

    Attributes:
        truth: "exact" in several hundred bits, "constant" likewise where all unknowns of a sample are equal, or "float64".
    """

    layer: Equilibrium
    x: Tensor
    truth: Literal["exact", "constant", "float64"] = "exact"


def matrix(rows: int, columns: int) -> Tensor:
    """Nonnegative, of one of the shapes that matter for spectra."""
    a = draw.rand(rows, columns)
    kind = draw.pick(("dense", "dense", "permutation", "reducible", "rank one", "diagonal", "sparse", "spread", "wild"))
    if kind == "permutation":
        a = a * torch.eye(rows, columns, dtype=a.dtype)[torch.randperm(rows)]
    elif kind == "reducible":
        a = torch.triu(a)
    elif kind == "rank one":
        a = draw.rand(rows, 1) * draw.rand(1, columns) + draw.power(-12, -1) * a
    elif kind == "diagonal":
        a = a * torch.eye(rows, columns, dtype=a.dtype)
    elif kind == "sparse":
        a = a * (draw.rand(rows, columns) < 0.4)
    elif kind == "spread":
        a = draw.powers(-8, 0, rows, columns)
    elif kind == "wild":
        a = draw.powers(-300, 0, rows, columns)
    return a


def scale_(module: nn.Module, factor: float) -> None:
    """A module's matrix times a number."""
    with torch.no_grad():
        if isinstance(module, DiagonalLowRank):
            module.diagonal.mul_(factor)
            module.left.mul_(factor)
        else:
            module.weight.mul_(factor)  # type: ignore[operator, union-attr]


def linear_module(n: int, dtype: torch.dtype, weight: Tensor, bias: bool = False) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias:
            module.bias.copy_(draw.powers(-4, 0, len(weight)) * (draw.rand(len(weight)) < 0.7))
    return module


def gap(dtype: torch.dtype) -> float:
    """1 - rho."""
    return draw.power(-12 if dtype == torch.float64 else -7.2, -2)


def injections(dtype: torch.dtype, *shape: int, extreme: bool = False) -> Tensor:
    """Positive, (BATCH, ...)."""
    double = dtype == torch.float64
    ordinary = [(-3, 0), (-9, 3), (-14, 2)]
    far = (
        [(-323, -307), (-310, -290), (-175, -160), (-160, -150), (-40, -30), (150, 160), (290, 305)]
        if double
        else [(-45, -37), (-42, -36), (-25, -18), (18, 25), (30, 37)]
    )
    low, high = map(float, draw.pick(far if extreme else ordinary))
    if draw.chance(0.5):
        low = high = draw.uniform(low, high)
    b = draw.powers(low, high, BATCH, *shape)
    if draw.chance(0.2):
        # Over 16 decades and more within a sample.
        b = draw.powers(high - 16 if high > (-290 if double else -25) else low, high, BATCH, *shape)
    return b.to(dtype).clamp_min(torch.finfo(dtype).tiny * torch.finfo(dtype).eps)


def finish(cell: nn.Sequential, x: Tensor, rho: float | None = None) -> Problem:
    """The layer, with its first matrix scaled so that the product of all has this radius."""
    if rho is not None:
        product = channel_product(trace(cell))
        # A matrix without a radius is scaled by its longest row.
        size = radius(product) or float(max(sum(row) for row in product))
        if size > 0:
            scale_(next(m for m in cell if any(True for _ in m.parameters())), rho / size)
    if draw.chance(0.1):
        return Problem(Equilibrium(cell, injection="softplus"), (draw.power(-1, 2) * draw.randn(*x.shape)).to(x.dtype))
    if draw.chance(0.2) and derive(trace(cell), (Sign.NONNEGATIVE,), (PositiveConcave(),)).theory:
        x = x * (draw.rand(*x.shape) < 0.6)
    if draw.chance(0.03):
        x[draw.integer(0, BATCH - 1)] = draw.pick((math.nan, math.inf))
    return Problem(Equilibrium(cell), x)


def wide() -> Problem:
    """Every activation, widths to 200, weight scales 0 to 100, injections 1e-9 to 1e3."""
    name, dtype = draw.pick(tuple(ACTIVATIONS)), draw.pick((torch.float32, torch.float64))
    n = round(draw.power(0, math.log10(200)))
    scale = 0.0 if draw.chance(0.05) else draw.power(-3, 2)
    if name in LINEAR:
        scale = min(scale, draw.uniform(0, 0.999))
    weight = draw.rand(n, n)
    if draw.chance(0.3):
        weight = weight * (draw.rand(n, n) < 0.2)
    weight = weight / weight.sum(1, keepdim=True).amax().clamp_min(1e-30) * scale
    low = draw.uniform(-9, 2)
    b = draw.powers(low, draw.uniform(low, 3), BATCH, n)
    cell = nn.Sequential(linear_module(n, dtype, weight), Inject(), Activate(name))
    return Problem(Equilibrium(cell), b.to(dtype), "float64")


def near_critical() -> Problem:
    """Spectral radii of 1 - 1e-2 to 1 - 1e-12, also where the activation bounds what they let grow."""
    dtype = draw.pick((torch.float64, torch.float64, torch.float32))
    n, name = draw.integer(1, 3), draw.pick((*LINEAR * 4, *SUBLINEAR * 2, *SUPREMA))
    x = injections(dtype, n)
    rho = 1 - gap(dtype)
    if name not in LINEAR:
        slope = ACTIVATIONS[name].slope_at_zero
        rho = (rho if draw.chance(0.5) else 2 - rho) / slope
        x = (x * draw.power(-20, -2)).clamp_min(torch.finfo(dtype).tiny)
    place = [Inject(), Activate(name)] if draw.chance(0.7) else [Activate(name), Inject()]
    return finish(nn.Sequential(linear_module(n, dtype, matrix(n, n)), *place), x, rho)


def extreme() -> Problem:
    """Subnormal, tiny and huge injections."""
    dtype = draw.pick((torch.float64, torch.float64, torch.float32))
    n, name = draw.integer(1, 3), draw.pick((*LINEAR * 2, *tuple(ACTIVATIONS)))
    x = injections(dtype, n, extreme=True)
    far = 300 if dtype == torch.float64 else 36
    rho = draw.pick((1 - gap(dtype), draw.uniform(0, 1), draw.power(-3, 2), draw.power(-far, far)))
    if name in LINEAR:
        rho = min(rho, draw.uniform(0, 1))
    place = [Inject(), Activate(name)] if draw.chance(0.7) else [Activate(name), Inject()]
    return finish(nn.Sequential(linear_module(n, dtype, matrix(n, n)), *place), x, rho)


def structured() -> Problem:
    """Sparse, diagonal plus low rank, convolutions and pooling."""
    dtype = draw.pick((torch.float64, torch.float32))
    kind = draw.pick(("sparse", "low rank", "conv1d", "conv2d", "pool", "grouped"))
    name = draw.pick((*LINEAR * 3, *tuple(ACTIVATIONS)))
    n = draw.integer(2, 4)
    shape: tuple[int, ...] = (n,)
    modules: list[nn.Module] = []
    bias = draw.chance(0.2)
    if kind == "sparse":
        mask = draw.rand(n, n) < 0.5
        mask[0, n - 1] = True
        module: nn.Module = SparseLinear(mask.nonzero().t(), n, bias=bias, dtype=dtype)
    elif kind == "low rank":
        shape = (n := draw.integer(1, 3),)
        module = DiagonalLowRank(n, draw.pick((1, 2, 8, 40)), bias=bias, dtype=dtype)
    elif kind in ("conv1d", "pool"):
        channels = draw.integer(1, 2)
        shape = (channels, draw.integer(1, 4 // channels))
        kernel = draw.pick((1, 3, 9))
        module = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, bias=bias, dtype=dtype)
        if kind == "pool":
            modules = [nn.AvgPool1d(3, 1, 1)]
    elif kind == "grouped":
        shape = (2, 2)
        module = nn.Conv1d(2, 2, 3, padding=1, groups=2, bias=bias, dtype=dtype)
    else:
        shape = (1, draw.integer(1, 2), draw.integer(1, 2))
        module = nn.Conv2d(1, 1, 3, padding=1, bias=bias, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                (draw.powers(-6, 0, *p.shape) if draw.chance(0.3) else draw.rand(*p.shape))
                * (draw.rand(*p.shape) < 0.9)
            )
    place = [Inject(), Activate(name)] if draw.chance(0.7) else [Activate(name), Inject()]
    cell = nn.Sequential(module, *modules, *place)
    x = injections(dtype, *shape, extreme=draw.chance(0.2))
    slope = 1 / ACTIVATIONS[name].slope_at_zero
    rho = (1 - gap(dtype)) * slope if draw.chance(0.7) else draw.power(-2, 2) if name not in LINEAR else 0.5
    return finish(cell, x, None if kind == "grouped" else rho)


def several() -> Problem:
    """Several affine steps, with biases, and activations between them."""
    dtype = draw.pick((torch.float64, torch.float32))
    n, inner = draw.integer(1, 3), draw.integer(1, 3)
    names = [draw.pick((*LINEAR * 4, *SUBLINEAR, *SUPREMA)) for _ in range(3)]
    first = linear_module(n, dtype, matrix(inner, n), draw.chance(0.4))
    second = linear_module(n, dtype, matrix(n, inner), draw.chance(0.4))
    modules = draw.pick(
        (
            [first, Activate(names[0]), second, Inject(), Activate(names[1])],
            [first, second, Inject(), Activate(names[1])],
            [first, Activate(names[0]), second, Activate(names[1]), Inject()],
            [first, Activate(names[0]), second, Inject()],
            [Activate(names[2]), first, Activate(names[0]), second, Inject(), Activate(names[1])],
        )
    )
    linear = all(m.activation.asymptotic_slope for m in modules if isinstance(m, Activate))
    rho = 1 - gap(dtype) if linear or draw.chance(0.5) else draw.power(-2, 2)
    return finish(nn.Sequential(*modules), injections(dtype, n, extreme=draw.chance(0.2)), rho)


def composite() -> Problem:
    """Sums and powers of activations."""
    dtype = draw.pick((torch.float64, torch.float32))
    n, name = draw.integer(1, 3), draw.pick(COMPOSITES)
    rho = 1 - gap(dtype) if name == "relu+0.3" or draw.chance(0.5) else draw.power(-2, 2)
    place = [Inject(), Activate(name)] if draw.chance(0.5) else [Activate(name), Inject()]
    x = injections(dtype, n, extreme=draw.chance(0.2))
    return finish(nn.Sequential(linear_module(n, dtype, matrix(n, n)), *place), x, rho)


def short_formats() -> Problem:
    """Weights in bfloat16 and float16."""
    n, name = draw.integer(1, 3), draw.pick((*LINEAR * 3, *tuple(ACTIVATIONS)))
    x = injections(torch.float32, n, extreme=draw.chance(0.2))
    cell = nn.Sequential(linear_module(n, torch.float32, matrix(n, n)), Inject(), Activate(name))
    problem = finish(cell, x, 1 - draw.power(-3, -1) if name in LINEAR else draw.power(-1, 1))
    problem.layer.to(draw.pick((torch.bfloat16, torch.float16)))
    return problem


def signed_injections(dtype: torch.dtype, *shape: int) -> Tensor:
    b = injections(dtype, *shape, extreme=draw.chance(0.4))
    sign = draw.pick((1.0, -1.0, 0.0))
    signs = torch.where(draw.rand(BATCH, *shape) < 0.5, 1.0, -1.0) if sign == 0 else sign
    b = (b * signs).to(dtype)
    return torch.where(draw.rand(BATCH, *shape) < 0.1, torch.zeros((), dtype=dtype), b) if draw.chance(0.3) else b


def contracting() -> Problem:
    """Subhomogeneous maps, normalised or not, and maps of bounded gain; injections of any sign."""
    dtype = draw.pick((torch.float64, torch.float64, torch.float32))
    n, kind = draw.integer(1, 3), draw.pick(("nonnegative", "normalised", "bounded gain", "signed", "two", "low rank"))
    x = signed_injections(dtype, n)
    modules: list[nn.Module] = [Activate(draw.pick(SHIFTED)), Inject()]
    if kind in ("nonnegative", "normalised"):
        weight = draw.power(-2, 1.5) * matrix(n, n)
        if kind == "normalised" or draw.chance(0.5):
            x = x.abs()
        if kind == "normalised":
            modules.append(Normalize(draw.pick((1.0, 2.0, math.inf))))
        affine: list[nn.Module] = [linear_module(n, dtype, weight, draw.chance(0.2))]
    else:
        activation = Activate(draw.pick((*MONOTONE, *SHIFTED)))
        modules = [Inject(), activation] if draw.chance(0.7) else [activation, Inject()]
        if kind == "low rank":
            module = DiagonalLowRank(n, draw.pick((1, 2, 8)), dtype=dtype)
            size = draw.power(-1, 1)
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(size * draw.randn(*p.shape) / p[0].numel())
            affine = [module]
        elif kind == "two":
            # Their product may be small by cancellation.
            inner, size = draw.integer(1, 3), draw.power(-12, 12)
            first, second = size * draw.randn(inner, n), draw.power(-2, 0.5) / size * draw.randn(n, inner)
            between = [Activate(draw.pick(MONOTONE))] if draw.chance(0.5) else []
            affine = [linear_module(n, dtype, first), *between, linear_module(n, dtype, second)]
        elif kind == "bounded gain":
            affine = [linear_module(n, dtype, BoundedRows(1 - gap(dtype))(1e3 * draw.randn(n, n)))]
        else:
            affine = [linear_module(n, dtype, draw.power(-2, 1) * draw.randn(n, n))]
    return Problem(Equilibrium(nn.Sequential(*affine, *modules), injection="free"), x)


def monotone() -> Problem:
    """I - W strongly monotone, dense and convolutional, with margins from 1 to 1e-9."""
    dtype = draw.pick((torch.float64, torch.float64, torch.float32))
    least = draw.power(-9 if dtype == torch.float64 else -5, 0)
    name = draw.pick((*MONOTONE, *MONOTONE, "tanh+1.2", "relu+0.1", "sigmoid+3"))
    layer: Equilibrium
    if draw.chance(0.3):
        shape: tuple[int, ...] = draw.pick(((1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 1, 1), (1, 1, 3)))
        layer = MonotoneConv2d(
            shape[0], shape[0], draw.pick((1, 3)), name, margin=least, injection="given", bias=False, dtype=dtype
        )
        scale = draw.power(-3, 1)
        with torch.no_grad():
            for p in layer.cell.parameters():
                p.mul_(scale)
    elif draw.chance(0.3):
        shape = (n := draw.integer(1, 3),)
        first, other = (draw.power(-3, 2) * draw.randn(n, n) for _ in range(2))
        weight = MonotoneOperator(least)(first, other)
        cell = nn.Sequential(linear_module(n, dtype, weight, bias=True), Inject(), Activate(name))
        layer = Equilibrium(cell, injection="free")
    else:
        shape = (draw.integer(1, 3),)
        layer = MonotoneLinear(shape[0], shape[0], name, margin=least, injection="given", bias=False, dtype=dtype)
        with torch.no_grad():
            for p in layer.cell.parameters():
                p.copy_(draw.power(-3, 2) * draw.randn(*p.shape))
    return Problem(layer, signed_injections(dtype, *shape))


def circulant() -> Problem:
    """Up to 200 unknowns that are all equal: long sums whose fixed point is that of one equation."""
    dtype = draw.pick((torch.float64, torch.float32))
    n, name = round(draw.power(0.3, math.log10(200))), draw.pick((*LINEAR * 3, *tuple(ACTIVATIONS)))
    row = draw.rand(n) if draw.chance(0.7) else draw.powers(-12, 0, n)
    row = row * (1 - gap(dtype) if name in LINEAR else draw.power(-1, 1)) / row.sum()
    weight = torch.stack([row.roll(k) for k in range(n)])
    cell = nn.Sequential(linear_module(n, dtype, weight), Inject(), Activate(name))
    x = injections(dtype, 1, extreme=draw.chance(0.2)).expand(BATCH, n).contiguous()
    return Problem(Equilibrium(cell), x, "constant")


FAMILIES: dict[str, Callable[[], Problem]] = {
    "wide": wide,
    "near critical": near_critical,
    "extreme": extreme,
    "structured": structured,
    "several steps": several,
    "composite": composite,
    "short formats": short_formats,
    "contracting": contracting,
    "monotone": monotone,
    "circulant": circulant,
}

# -------------------------------------------------------------------------------------------------------------- solvers

SOLVERS: dict[str, IterativeSolver] = {
    "auto": Auto(),
    "picard": Picard(),
    "anderson": Anderson(),
    "newton": Newton(),
    "batched": Newton(linear="batched"),
    "chord": Newton(linear="chord"),
    "krylov": Newton(linear="krylov"),
    "broyden": Broyden(),
}
TOLERANCES = (0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10)
SPLITTINGS = (OperatorSplitting(), OperatorSplitting(scheme="forward_backward"))


def random_solver(solver: IterativeSolver, dtype: torch.dtype) -> IterativeSolver:
    """A solver with random options."""
    options: dict[str, Any] = {"tol": draw.pick(TOLERANCES), "max_steps": draw.pick((3, 4, 5, 8, 20, 60, 60, 200))}
    if draw.chance(0.15):
        options["steps"] = draw.integer(5, 16)
    if draw.chance(0.15) and dtype == torch.float32:
        options["proof_dtype"] = torch.float32
    if draw.chance(0.02):
        options["stop"] = "residual"
    if draw.chance(0.15) and hasattr(solver, "step_dtype"):
        options["step_dtype"] = draw.pick((torch.bfloat16, torch.float32))
    return replace(solver, on_failure="ignore", **options)


GUESSES = (
    "scaled",
    "scaled",
    "mixed",
    "mixed",
    "subnormal",
    "zero",
    "exact",
    "ulps",
    "near",
    "huge",
    "negative",
    "broken",
)


def random_guess(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """A guess or candidate for these fixed points, from exact to absurd."""
    z, kind = truth.nan_to_num(1.0), draw.pick(GUESSES)
    shape = z.shape
    if kind == "scaled":
        z = z * draw.power(-16, 16)
    elif kind == "mixed":
        reach = draw.pick((0.3, 3, 16))
        z = z * draw.powers(-reach, reach, *shape)
    elif kind == "subnormal":
        z = torch.full_like(z, torch.finfo(dtype).tiny * torch.finfo(dtype).eps * draw.integer(1, 1000))
    elif kind == "zero":
        z = torch.zeros_like(z)
    elif kind == "ulps":
        z = z.to(dtype)
        z = z * (1 + torch.finfo(dtype).eps * torch.randint(-4, 5, shape))
    elif kind == "near":
        z = z * (1 + draw.power(-14, -0.5) * (2 * draw.rand(*shape) - 1))
    elif kind == "huge":
        z = torch.full_like(z, torch.finfo(dtype).max * draw.power(-30, -1))
    elif kind == "negative":
        z = -z * draw.power(-3, 3)
    elif kind == "broken":
        z = torch.where(draw.rand(*shape) < 0.3, draw.pick((math.nan, math.inf, -math.inf)), z)
    return z.to(dtype)


class Recording:
    """A solver that keeps what its last adjoint was given and gave."""

    def __init__(self, solver: IterativeSolver) -> None:
        self.solver = solver
        self.tol, self.max_steps, self.on_failure = solver.tol, solver.max_steps, solver.on_failure
        self.last: tuple[Tensor, Tensor, AdjointSolution, Tensor | None] | None = None

    def solve(self, problem: FixedPointProblem, z0: Tensor | None = None) -> Solution:
        return self.solver.solve(problem, z0)

    def solve_adjoint(
        self,
        map: Map,
        z: Tensor,
        injection: Tensor,
        v: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        theory: Theory | None,
    ) -> tuple[Tensor, AdjointSolution]:
        g, report = adjoint.solve_adjoint(map, z, injection, v, self.solver, bounds=bounds, theory=theory)
        weights = None
        if bounds is not None and report.bounded and isinstance(map, Chain):
            weights = norm_weights(map, z, injection, bounds, theory)
        self.last = v, g, report, weights
        return g, report


def norm_weights(
    chain: Chain, z: Tensor, injection: Tensor, bounds: tuple[Tensor, Tensor], theory: Theory | None
) -> Tensor | None:
    """The weights of the norm in which an adjoint's error was bounded; None for the Euclidean one."""
    assert theory is not None
    model = Aggregation.of(chain, z) if theory.rises else None
    bound = theory.bound_gradient(chain, injection, bounds, model=model, fixed=False)
    return bound.weights if isinstance(bound, WeightedNormBound) else None


# ------------------------------------------------------------------------------------------------------------- measuring


def float64_truth(chain: Chain, b: Tensor) -> Truth:
    """For a one-layer dense chain: Picard from below, then Newton kept above those lower points.

    Where Newton does not settle, Picard alone goes on.
    """
    chain, b = chain.to(torch.float64), b.double()
    low = torch.zeros_like(b)
    for _ in range(400):
        low = chain(low, b)
    weight = chain.affine[0].weights[0]
    eye = torch.eye(b.shape[1], dtype=torch.float64)

    def system(z: Tensor) -> Tensor:
        diagonal = chain.linearize_steps(z, b).slope
        return eye - diagonal.unsqueeze(-1) * weight

    z = low
    for _ in range(30):
        z = torch.maximum(z + torch.linalg.solve(system(z), chain(z, b) - z), low)
        if bool(((chain(z, b) - z).abs() <= 1e-15 * z).all()):
            break
    settled = ((chain(z, b) - z).abs() <= 1e-14 * z).all(1, keepdim=True)
    z = torch.where(settled, z, low)
    for _ in range(200_000):
        if bool(((chain(z, b) - z).abs() <= 1e-14 * z).all()):
            break
        z = torch.where(settled, z, chain(z, b))
    residual = (chain(z, b) - z).abs()
    error = torch.linalg.solve(system(z), residual + 1e-15 * z * math.sqrt(b.shape[1])).abs() * 2
    good = (residual <= 1e-10 * z).all(1, keepdim=True)
    return Truth(torch.where(good, z, math.nan), torch.zeros_like(z), error)


@dataclass
class Tally:
    """Counts of every family, what was found wrong, and the numbers that medians are taken of."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in FAMILIES})
    findings: list[dict[str, Any]] = field(default_factory=list)
    tightness: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        for name, counter in other.counts.items():
            self.counts[name].update(counter)
        self.findings += other.findings
        for mine, theirs in ((self.tightness, other.tightness), (self.steps, other.steps)):
            for key, values in theirs.items():
                mine.setdefault(key, []).extend(values)

    def summary(self) -> dict[str, Any]:
        total: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        for counter in self.counts.values():
            total.update(counter)
        return {
            **total,
            "bound_over_true_error_median": {k: round(_median(self.tightness[k]), 3) for k in _sorted(self.tightness)},
            "median_evaluations": {k: _median(self.steps[k]) for k in _sorted(self.steps)},
            "families": {name: {k: counter[k] for k in _COUNTS if counter[k]} for name, counter in self.counts.items()},
            "findings": sorted(self.findings, key=lambda f: f["cell"])[:_FINDINGS],
        }


_COUNTS = (
    "samples",
    "proven",
    "misses",
    "bound_below_error",
    "not_converged",
    "verified",
    "verify_misses",
    "adjoints",
    "adjoint_misses",
    "refused",
    "without_truth",
    "exceptions",
)
FALSE = ("misses", "bound_below_error", "verify_misses", "adjoint_misses")
_FINDINGS = 200


def _sorted(found: dict[str, list[float]]) -> list[str]:
    return sorted(found, key=float, reverse=True)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median()) if values else math.nan


class Trial:
    """One cell with its batch: solve, verify, differentiate, and compare with the truth."""

    def __init__(
        self, cell: int, seed: int, solvers: tuple[str, ...], tolerances: tuple[float, ...] | None = None
    ) -> None:
        self.cell, self.tally = cell, Tally()
        torch.manual_seed(seed * 1_000_003 + cell)
        self.family = tuple(FAMILIES)[cell % len(FAMILIES)]
        self.count = self.tally.counts[self.family]
        self.solvers = solvers

    def run(self) -> Tally:
        self.guarded("problem", self._run)
        return self.tally

    def guarded(self, what: str, action: Callable[[], None]) -> None:
        """An exception is a finding."""
        try:
            action()
        except Exception:
            self.count["exceptions"] += 1
            self.found("exception in " + what, 0, traceback.format_exc(limit=-3))

    def found(self, what: str, sample: int, detail: str) -> None:
        number = self.cell * BATCH + sample
        self.tally.findings.append(
            {"what": what, "family": self.family, "cell": self.cell, "sample": number, "detail": detail}
        )

    def judge(self, what: str, wrong: Tensor, detail: Callable[[int], str]) -> None:
        """Count the samples where something is wrong, and keep the first."""
        where = wrong.nonzero().flatten().tolist()
        if where:
            self.count[what] += len(where)
            self.found(what, where[0], detail(where[0]))

    @torch.no_grad()
    def _pose(self) -> bool:
        self.problem = FAMILIES[self.family]()
        layer = self.problem.layer
        certificate = layer.certificate()
        self.concave = certificate.kind == "positive concave" and bool(certificate)
        if not certificate and layer.injection != "free":
            self.count["refused"] += BATCH
            return False
        self.chain = trace(layer.cell)
        self.b = layer.injected(self.problem.x)
        chain = self.chain.rebind([t.to(self.b.dtype) for t in self.chain.tensors])
        if self.problem.truth == "float64":
            self.truth = float64_truth(chain, self.b)
        else:
            constant = self.problem.truth == "constant"
            self.exact = ExactCell.on_constants(chain) if constant else ExactCell(chain, self.b.shape[1:])
            unknowns = self.b[:, :1] if constant else self.b
            guess = (
                Picard(tol=1e-8, max_steps=100, on_failure="ignore")
                .solve(FixedPointProblem(map=chain, injection=self.b))
                .value
            )
            self.truth = self.exact.truth(unknowns, guess[:, :1] if constant else guess, concave=self.concave)
            if constant:
                self.truth = self.truth.spread(self.b.shape)
        self.count["without_truth"] += int((~self.truth.known).sum())
        return True

    def _run(self) -> None:
        if not self._pose():
            return
        layer = self.problem.layer
        self.solver = random_solver(self._solver(), self.b.dtype)
        layer.solver = self.solver
        self.guess = random_guess(self.truth.high, self.b.dtype) if draw.chance(0.5) else None
        self.candidate = random_guess(self.truth.high, draw.pick((self.b.dtype, torch.float64)))
        verifying, differentiating = draw.chance(0.4), draw.chance(0.25)
        self.guarded("solve", self._solve)
        if self.concave and verifying:
            self.guarded("enclose", self._verify)
        if self.problem.truth == "exact" and differentiating:
            self.guarded("gradient", self._differentiate)

    def _solver(self) -> IterativeSolver:
        if self.family == "monotone" and draw.chance(0.3):
            sigma = self.chain.last_activation
            projects = sigma is not None and sigma.name in ("relu", "relu6", "identity")
            return SPLITTINGS[projects and draw.chance(0.5)]
        return SOLVERS[draw.pick(self.solvers)]

    def _solve(self) -> None:
        s = self.problem.layer.solve(self.problem.x, z0=self.guess)
        truth, count = self.truth, self.count
        proven, tol = s.proven.clone(), f"{self.solver.tol:g}"
        count["samples"] += len(self.b)
        count["not_converged"] += int((~s.converged).sum())
        count["proven"] += int(proven.sum())
        self.tally.steps[tol] = s.steps[s.converged].tolist()
        if s.lower is None or s.upper is None or not bool(proven.any()):
            return
        outside = truth.exceeds(s.upper) | truth.falls_below(s.lower) | ~self.b.isfinite().flatten(1).all(1)
        self.judge("misses", outside & proven, lambda k: self._describe(k, s.lower, s.upper))
        distance, certain = truth.distance(s.value)
        bound = s.error_bound.double()
        ratio, sure = self._relative(distance, s.lower), self._relative(certain, s.lower)
        promised = s.converged & (s.stopping == "enclosure")
        below = (bound < sure * (1 - 1e-15)) | bound.isnan() | (promised & (bound > self.solver.tol))
        self.judge(
            "bound_below_error",
            below & proven & truth.known,
            lambda k: (
                f"error_bound {float(bound[k])!r}, true error {float(sure[k])!r}; "
                + self._describe(k, s.lower, s.upper)
            ),
        )
        sharp = proven & s.converged & truth.known & (sure > 0.9 * ratio) & (ratio > 0)
        self.tally.tightness[tol] = (bound / ratio)[sharp].tolist()

    def _relative(self, distance: Tensor, lower: Tensor) -> Tensor:
        """(batch,) by each entry where all are known to be positive, else by the largest of the fixed point and b."""
        size = self.truth.high.abs().flatten(1)
        whole = torch.maximum(size.amax(1), self.b.double().abs().flatten(1).amax(1))
        positive = (lower > 0).flatten(1).all(1)
        distance = distance.flatten(1)
        entrywise = torch.where(distance == 0, 0.0, distance / size).amax(1)
        by_largest = torch.where(distance == 0, 0.0, distance / whole.unsqueeze(1)).amax(1)
        return torch.where(positive | self.concave, entrywise, by_largest)

    def _verify(self) -> None:
        dtype = (
            draw.pick((torch.float64, torch.float64, torch.float32)) if self.b.dtype == torch.float32 else torch.float64
        )
        cell = self.chain.rebind([t.detach().to(self.b.dtype) for t in self.chain.tensors])
        try:
            found = enclose(cell, self.candidate, self.b, proof_dtype=dtype)
        except Refusal:
            return
        self.count["verified"] += int(found.proven.sum())
        outside = self.truth.exceeds(found.upper) | self.truth.falls_below(found.lower)
        self.judge(
            "verify_misses",
            outside & found.proven,
            lambda k: self._describe(k, found.lower, found.upper, self.candidate),
        )

    def _differentiate(self) -> None:
        layer = self.problem.layer
        recording = layer.solver = Recording(self.solver)  # type: ignore[assignment]
        x = self.problem.x.clone().requires_grad_()
        y = layer(x, z0=self.guess)
        y.backward(self._cotangent(y))
        layer.solver = self.solver
        if recording.last is None:
            return
        v, g, report, weights = recording.last
        bounded = (
            report.error_bound.isfinite() & self.truth.known if report.bounded else torch.zeros_like(self.truth.known)
        )
        self.count["adjoints"] += int(bounded.sum())
        wrong, details = torch.zeros_like(bounded), {}
        for k in bounded.nonzero().flatten().tolist():
            error = self._adjoint_error(k, v[k], g[k], None if weights is None else weights[k])
            bound = float(report.error_bound[k])
            if not bound >= error * (1 - 1e-12):
                wrong[k] = True
                details[k] = (
                    f"adjoint.error_bound {bound!r}, true error {error!r}, v {_digits(v[k])}, g {_digits(g[k])}"
                )
        self.judge("adjoint_misses", wrong, lambda k: f"{details[k]}; " + self._describe(k, None, None))

    def _cotangent(self, y: Tensor) -> Tensor:
        """Ordinary, tiny, huge, over many decades, along one axis, or zero in some samples."""
        v = torch.randn_like(y)
        kind = draw.pick(("ordinary", "scaled", "scaled", "decades", "one", "zeros"))
        scales = (
            (1e-200, 1e200, 1e-300, 1e-320, 1e300) if y.dtype == torch.float64 else (1e-25, 1e25, 1e-37, 1e-44, 1e37)
        )
        if kind == "scaled":
            v = v * draw.pick(scales)
        elif kind == "decades":
            v = v * draw.powers(-16, 16, *v.shape).to(v)
        elif kind == "one":
            v = v * (torch.randperm(v[0].numel()) == 0).view(v.shape[1:])
        elif kind == "zeros":
            v = v * (draw.rand(len(v), *[1] * (v.dim() - 1)) < 0.5)
        return v

    def _adjoint_error(self, k: int, v: Tensor, g: Tensor, weights: Tensor | None) -> float:
        """In the weighted norm, or the Euclidean one, relative to that of g."""
        point = self.truth.points[k]
        assert point is not None

        exact = self.exact.adjoint(point, numbers(self.b[k]), numbers(v))
        if exact is None:
            return 0.0
        with mpmath.workprec(320):
            found = numbers(g)
            error = [abs(a - e) for a, e in zip(found, exact, strict=True)]
            if weights is None:
                top, bottom = (mpmath.sqrt(sum(x * x for x in t)) for t in (error, found))
            else:
                w = numbers(weights)
                top, bottom = (sum(a * abs(x) for a, x in zip(w, t, strict=True)) for t in (error, found))
            return float(top / bottom) if bottom else (math.inf if top else 0.0)

    def _describe(self, k: int, lower: Tensor | None, upper: Tensor | None, candidate: Tensor | None = None) -> str:
        """The problem of one sample, in full."""
        parts = [f"solver {self.solver!r}", f"cell {self.problem.layer.cell!r}"]
        parts += [f"{name} {_digits(t)}" for name, t in self.problem.layer.cell.state_dict().items()]
        guess = self.guess if candidate is None else candidate
        tensors = {"b": self.b[k], "z0": None if guess is None else guess[k], "z*": self.truth.high[k]}
        tensors |= {"lower": None if lower is None else lower[k], "upper": None if upper is None else upper[k]}
        parts += [f"{name} {_digits(t)}" for name, t in tensors.items() if t is not None]
        return "; ".join(parts)


def _digits(t: Tensor) -> str:
    if t.numel() > 64:
        return f"of shape {tuple(t.shape)}"
    return (
        f"{str(t.dtype).removeprefix('torch.')} {t.detach().double().tolist() if t.is_floating_point() else t.tolist()}"
    )


def _part(cells: Iterable[int], seed: int, solvers: tuple[str, ...]) -> Tally:
    warnings.simplefilter("ignore")
    tally = Tally()
    for cell in cells:
        tally.add(Trial(cell, seed, solvers).run())
    return tally


def measure(
    samples: int, seed: int = 0, solver: str = "all", workers: int = 1, progress: bool = False
) -> dict[str, Any]:
    """Counts over at least so many samples, families in turn; cell k is the same for every number of samples."""
    solvers = tuple(SOLVERS) if solver == "all" else (solver,)
    cells, began = math.ceil(samples / BATCH), time.monotonic()
    parts = [range(k, min(k + 50, cells)) for k in range(0, cells, 50)]
    tally, told = Tally(), began
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        for part, found in zip(parts, _parts(parts, seed, solvers, workers), strict=True):
            tally.add(found)
            for finding in found.findings if progress else ():
                where = f"{finding['family']}, cell {finding['cell']}, sample {finding['sample']}"
                print(f"{finding['what']}: {where}", file=sys.stderr, flush=True)
            if progress and (time.monotonic() - told > 15 or part is parts[-1]):
                told, totals = time.monotonic(), tally.summary()
                wrong = ", ".join(f"{name} {totals[name]}" for name in (*FALSE, "exceptions"))
                print(f"{part.stop * BATCH:>8} samples, {told - began:.0f} s: {wrong}", file=sys.stderr, flush=True)
    return {"seed": seed, "solver": solver, **tally.summary()}


def _parts(parts: list[range], seed: int, solvers: tuple[str, ...], workers: int) -> Iterable[Tally]:
    if workers == 1:
        yield from (_part(part, seed, solvers) for part in parts)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(_part, parts, [seed] * len(parts), [solvers] * len(parts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", choices=["all", *SOLVERS], default="all")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, metavar="K", help="the cell of this number alone, in full precision")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only is not None:
        return show(arguments.only, arguments.seed, arguments.solver)
    result = measure(arguments.samples, arguments.seed, arguments.solver, arguments.workers, progress=True)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)
    return int(any(result[name] for name in FALSE))


def show(cell: int, seed: int, solver: str) -> int:
    """Run one cell again, and print its problem and what was found."""
    warnings.simplefilter("ignore")
    trial = Trial(cell, seed, tuple(SOLVERS) if solver == "all" else (solver,))
    tally = trial.run()
    print(f"family {trial.family}")
    for k in range(BATCH if hasattr(trial, "guess") else 0):
        print(f"sample {cell * BATCH + k}: {trial._describe(k, None, None)}")
    print(json.dumps(tally.summary(), indent=2))
    return int(any(tally.counts[trial.family][name] for name in FALSE))


if __name__ == "__main__":
    sys.exit(main())
