"""Cells and random problems that several tests share."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from perron.activations import ACTIVATIONS
from perron.cells import Activate, Chain, DenseStep, Inject, trace
from perron.data.graphs import GRAPHS
from perron.nn import Equilibrium
from perron.solvers import Picard, Solver

BOUNDED = [a.name for a in ACTIVATIONS.values() if a.bounded]
SUBLINEAR = [a.name for a in ACTIVATIONS.values() if a.asymptotic_slope == 0]


class Tenfold:
    """A step that nobody knows: no Jacobian of it is the identity."""

    def __call__(self, v: Tensor, injection: Tensor) -> Tensor:
        return 10 * v


class TenfoldMatrix(DenseStep):
    """A subclass of a known step that computes something else."""

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        return 10 * super().apply(v, bias)


def dense_layer(weight: Tensor, activation: str, *, solver: Solver | None = None) -> Equilibrium:
    """Equilibrium layer z = sigma(W z + b) with b given."""
    linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return Equilibrium(nn.Sequential(linear, Inject(), Activate(activation)), solver=solver or Picard())


def long_picard(chain: Chain, b: Tensor, steps: int = 3000) -> Tensor:
    """Float64 fixed point from below, for maps whose rate is well below 1."""
    with torch.no_grad():
        chain, b = chain.to(torch.float64), b.detach().double()
        z = torch.zeros_like(b)
        for _ in range(steps):
            z, old = chain(z, b), z
            if bool((z == old).all()):
                break
    return z


def truth(layer: Equilibrium, b: Tensor) -> Tensor:
    return long_picard(trace(layer.cell), b)


def below_one(rows: list[list[Fraction]]) -> bool:
    """Whether a nonnegative matrix A has spectral radius below 1: all leading minors of I - A are positive, exactly."""
    a = [[Fraction(i == j) - x for j, x in enumerate(row)] for i, row in enumerate(rows)]
    for k in range(len(a)):
        if a[k][k] <= 0:
            return False
        for i in range(k + 1, len(a)):
            share = a[i][k] / a[k][k]
            a[i] = [x - share * y for x, y in zip(a[i], a[k], strict=True)]
    return True


def fractions(weight: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in weight.tolist()]


@st.composite
def dense_problems(draw: st.DrawFn, activations: list[str] = SUBLINEAR) -> tuple[Equilibrium, Tensor]:
    """A random positive concave layer with its injections: widths 1 to 40, scales 0 to 100, b from 1e-9 to 1e3."""
    name = draw(st.sampled_from(activations))
    n = draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, 0.5, 0.99, 1.5, 10.0, 100.0]))
    sparsity = draw(st.sampled_from([0.1, 1.0]))
    weight = torch.rand(n, n, generator=generator, dtype=dtype)
    weight = weight * (torch.rand(n, n, generator=generator) < sparsity)
    weight = weight / weight.sum(1).max().clamp_min(1e-30) * scale
    low, high = sorted(draw(st.lists(st.integers(-9, 3), min_size=2, max_size=2)))
    exponents = low + (high - low) * torch.rand(4, n, generator=generator, dtype=torch.float64)
    return dense_layer(weight, name), (10**exponents).to(dtype)


def write_graph(folder: Path, name: str, nodes: int = 60, hyper: bool = False, **changes: np.ndarray) -> None:
    """A small graph of three communities, in the form of the files."""
    generator = np.random.default_rng(0)
    label = np.arange(nodes) % 3
    same = generator.integers(0, nodes // 3, (2, 4 * nodes))
    edges = 3 * same + generator.integers(0, 3, 4 * nodes)
    arrays = {
        "feature_row": np.repeat(np.arange(nodes), 2).astype(np.int32),
        "feature_col": generator.integers(0, 12, 2 * nodes).astype(np.int32),
        "feature_value": np.ones(2 * nodes, np.float32),
        "feature_shape": np.array([nodes, 12]),
        "label": label.astype(np.int16),
    }
    if hyper:
        arrays |= {"hyperedge_ptr": np.arange(0, 4 * nodes + 1, 4), "hyperedge_node": edges.reshape(-1)[: 4 * nodes]}
    else:
        arrays["edge_index"] = edges.astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / GRAPHS[name][0], **{**arrays, **changes})


def _density(repulsion: float) -> Callable[[Tensor], Tensor]:
    """Density of the 5 lowest of 10 orbitals of a chain of sites that repel each other in the mean."""
    hopping = torch.diag(torch.ones(9, dtype=torch.float64), 1)
    energies = torch.linspace(-0.5, 0.5, 10, dtype=torch.float64)

    def density(n: Tensor) -> Tensor:
        sites = (energies + repulsion * n.double()).nan_to_num()
        orbitals = torch.linalg.eigh(hopping + hopping.t() + torch.diag_embed(sites))[1]
        return orbitals[..., :5].square().sum(-1).to(n.dtype)

    return density


def _diagonal(z: Tensor) -> Tensor:
    return z * z.new_tensor([-3.0, -2.0, 0.5]) + 1


def _rotation(z: Tensor) -> Tensor:
    return 1.2 * torch.stack([-z[:, 1], z[:, 0]], 1) + z.new_tensor([1.0, 0.5])


# Maps that Picard's steps leave, most of them expanding: f, entries, start, evaluations of Anderson(5) as in textbooks,
# without any safeguard, to a relative residual of 1e-6 (the last one meets NaN).
UNRULY: dict[str, tuple[Callable[[Tensor], Tensor], int, float, int]] = {
    "diagonal": (_diagonal, 3, 0.0, 5),
    "rotation": (_rotation, 2, 0.0, 4),
    "steep sigmoid": (lambda z: torch.sigmoid(-8 * (z - 0.4)), 1, 0.0, 12),
    "exponential": (lambda z: 3 * torch.exp(-2 * z), 1, 0.0, 12),
    "density, U = 2": (_density(2.0), 10, 0.0, 10),
    "density, U = 4": (_density(4.0), 10, 0.0, 11),
    "density, U = 8": (_density(8.0), 10, 0.0, 13),
    "logarithms": (lambda z: torch.log(3 / z) / torch.log(3.7477525683 * z / (z - 1)) + 1, 1, 1.001, 12),
}


class Counting(nn.Module):
    """A cell z -> f(z) that counts its evaluations; the injection only gives the shape."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.evaluations = function, 0

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        self.evaluations += 1
        return self.function(z)
