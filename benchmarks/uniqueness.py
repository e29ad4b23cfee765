"""False certificates: second fixed points, edges of the criteria, and maps about which nothing may be said.

Maps: subhomogeneous ones with nonnegative weights, normalised or not, some with negative injections; signed weights,
plain, with bounded rows, and near the counterexamples with two fixed points (mutual inhibition, W = [[a, -b], [-c, d]]);
monotone operators, and matrices that are nearly monotone. Each is solved once with the default solver. From many random
starts Picard steps, damped and not, and Newton steps then look for fixed points in float64; a certificate is false if
one lies outside of a proven enclosure, or if two of them are found where something was proven.

Edges: spectral radii, gains and margins within 1e-2 to 1e-17 of what the certificates ask for, in layers of float64,
float32 and bfloat16 whose matrices are dense, sparse, of low rank, convolutions or products. The radius, the gain and
the definiteness of the stored tensors are computed without rounding; a certificate that they contradict is false, and
so is a fixed point proven where the radius says that there is none.

Refusals: maps of a space into another one, weights that overflow or are no real numbers, steps nobody knows. A
certificate is false, and an exception is counted.

    python benchmarks/uniqueness.py --maps 20000 --output benchmarks/results/uniqueness.json
    python benchmarks/uniqueness.py --seed 0 --only 1234
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import torch
from draw import chance, integer, pick, uniform
from exact import ExactCell, Matrix, channel_product, exact_channels, positive_pivots, radius
from mpmath import mpf
from torch import Tensor, nn

from perron._files import write_json
from perron.activations import ACTIVATIONS
from perron.cells import (
    Activate,
    ActivationStep,
    Chain,
    DiagonalLowRank,
    Inject,
    Normalize,
    Refusal,
    SparseLinear,
    trace,
)
from perron.constraints import BoundedRows, MonotoneOperator
from perron.nn import Equilibrium, GraphEquilibrium
from perron.solvers import Auto, Solution
from perron.theory import (
    Certificate,
    PositiveConcave,
    Sign,
    activation_degree,
    certify,
    degree,
    derive,
    gain,
    margin,
)
from perron.theory.certify import THEORIES

SHIFTED = ("tanh+1.2", "tanh+1.05", "tanh+1.603", "softsign+1.1", "sigmoid", "(tanh+1.2)^0.5", "arctan+1.7")
MONOTONE = ("relu", "tanh", "sigmoid", "softsign", "identity")
STARTS = 40


# ------------------------------------------------------------------------------------------------ second fixed points


def random_map(family: str) -> tuple[Equilibrium, Tensor]:
    """A layer and one injection, (1, n)."""
    n = 2 if family == "inhibition" else 1 + int(uniform(0, 6))
    rand, normal, other = (f(n, n, dtype=torch.float64) for f in (torch.rand, torch.randn, torch.randn))
    scale, name = 10 ** uniform(-1.5, 1.5), pick(SHIFTED)
    modules: list[nn.Module] = [Activate(name), Inject()]
    b = 10 ** uniform(-2, 0.5) * torch.rand(1, n, dtype=torch.float64)
    if family in ("nonnegative", "normalised"):
        weight = scale * rand
        if chance(0.3):
            # The fixed point may then be negative.
            b = b - 4 * uniform(0, 1)
    elif family == "bounded":
        weight = BoundedRows(1 - 10 ** uniform(-12, -0.1))(normal)
        modules = [Inject(), Activate(pick(MONOTONE))]
        b = b - 0.5
    elif family == "inhibition":
        weight = scale * (1 + 0.3 * normal) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        b = b * uniform(0, 1) ** 3
    elif family == "signed":
        weight = 0.3 * scale * normal
    else:
        margin = 10 ** uniform(-9, 0)
        weight = MonotoneOperator(margin)(0.2 * scale * normal, 0.2 * scale * other)
        if family == "nearly monotone":
            weight = weight + torch.eye(n, dtype=torch.float64) * margin * uniform(0.5, 3)
        modules = [Inject(), Activate(pick(MONOTONE))]
        b = 4 * (b - 0.5)
    if family == "normalised" or (family == "signed" and chance(0.2)):
        modules.append(Normalize((1.0, 2.0, math.inf)[int(uniform(0, 2.999))]))
    linear = nn.Linear(n, n, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return Equilibrium(nn.Sequential(linear, *modules), injection="free"), b


def fixed_points(chain: Chain, b: Tensor) -> Tensor:
    """(count, n): distinct points with F(z) = z to 1e-10, as far as they were found."""
    n = b.shape[1]
    b = b.expand(STARTS, n)
    spread = 10 ** (3 * torch.rand(STARTS, 1, dtype=b.dtype) - 1)
    z = spread * (torch.rand(STARTS, n, dtype=b.dtype) - 0.2)
    candidates = []
    for damping in (1.0, 0.5, 0.1):
        y = z
        for _ in range(60):
            y = y + damping * (chain(y, b) - y)
        candidates.append(y)
    if not chain.normalizes:
        weight, eye = chain.affine[0].weights[0], torch.eye(n, dtype=b.dtype)
        for start in (z, candidates[1]):
            y = start
            for _ in range(25):
                jacobian = chain.linearize_steps(y, b).factors[1].diagonal().unsqueeze(2) * weight
                step, _ = torch.linalg.solve_ex(eye - jacobian, chain(y, b) - y)
                y = y + step.clamp(-10, 10)
            candidates.append(y)
    points = torch.cat(candidates)
    images = chain(points, b[:1].expand(len(points), n))
    good = ((images - points).abs() <= 1e-10 * (1 + points.abs())).all(1)
    found: list[Tensor] = []
    for point in points[good]:
        if all(float((point - p).abs().max()) > 1e-5 * (1 + float(p.abs().max())) for p in found):
            found.append(point)
    return torch.stack(found) if found else points[:0]


def refined(chain: Chain, b: Tensor, points: Tensor) -> Tensor:
    """What Newton's method in several hundred bits makes of points; near an edge a small residual says little."""
    cell = ExactCell(chain, b.shape[1:])
    start = [mpf(x) for x in b[0].tolist()]
    exact = [cell.fixed_point(start, point.tolist(), concave=False)[0] for point in points]
    return b.new_tensor([[float(x) for x in point] for point in exact if point is not None]).view(-1, b.shape[1])


def spread(points: Tensor) -> float:
    """The largest relative distance between them."""
    apart = (points[:, None] - points[None]).abs() / (1 + points.abs())
    return float(apart.max()) if points.numel() else 0.0


def excluded(points: Tensor, solution: Solution) -> bool:
    """Whether one lies outside of the enclosure."""
    assert solution.lower is not None
    assert solution.upper is not None
    slack = 1e-8 * (1 + points.abs())
    return bool(((points < solution.lower - slack) | (points > solution.upper + slack)).any())


def search(family: str, count: Counter[str]) -> str:
    """Solve one map and look for second fixed points; returns what it was."""
    layer, b = random_map(family)
    layer.solver = Auto(max_steps=2000, on_failure="ignore")
    certified, solution = bool(layer.certificate()), layer.solve(b)
    chain = trace(layer.cell)
    points = fixed_points(chain, b)
    proven = bool(solution.proven.all())
    count["certified for every input"] += certified
    count["proven"] += proven
    count["not converged though proven"] += proven and not bool(solution.converged.all())
    several, outside = len(points) > 1, proven and excluded(points, solution)
    if outside or (several and (proven or certified)):
        points = refined(chain, b, points)
        several, outside = spread(points) > 1e-5, proven and excluded(points, solution)
    count["several fixed points found"] += several
    count["false certificates"] += outside or (several and (proven or certified))
    return f"{layer.cell}, weight {chain.affine[0].weights[0].tolist()}, b {b.tolist()}, {len(points)} points"


# ---------------------------------------------------------------------------------------------------------------- edges


@dataclass(frozen=True)
class Edge:
    """A cell whose criterion is nearly met or nearly missed."""

    layer: Equilibrium
    shape: tuple[int, ...]


def edge_modules(signed: bool) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Affine modules in float64, and the shape of the states they act on."""
    n = integer(1, 4)
    kind = pick(("dense", "dense", "sparse", "low rank", "low rank", "conv1d", "conv1d", "conv2d", "two", "pool"))
    shape: tuple[int, ...] = (n,)
    double = torch.float64
    if kind == "dense":
        modules: list[nn.Module] = [nn.Linear(n, n, bias=False, dtype=double)]
    elif kind == "sparse":
        mask = torch.rand(n, n) < 0.6
        mask[0, 0] = True
        modules = [SparseLinear(mask.nonzero().t(), n, dtype=double)]
    elif kind == "low rank":
        n = integer(1, 3)
        shape = (n,)
        modules = [DiagonalLowRank(n, pick((1, 3, 10, 40)), dtype=double)]
    elif kind == "conv1d":
        channels, taps = pick((1, 1, 2, 7)), pick((1, 3, 9))
        shape = (channels, 4)
        modules = [nn.Conv1d(channels, channels, taps, padding=taps // 2, bias=False, dtype=double)]
    elif kind == "conv2d":
        channels = pick((1, 2))
        shape = (channels, 3, 3)
        modules = [nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=double)]
    elif kind == "two":
        inner = integer(1, 4)
        modules = [nn.Linear(n, inner, bias=False, dtype=double), nn.Linear(inner, n, bias=False, dtype=double)]
    else:
        shape = (1, 4)
        modules = [nn.AvgPool1d(3, 1, 1), nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=double)]
    with torch.no_grad():
        for module in modules:
            symmetric = chance(0.3)
            for p in module.parameters():
                p.copy_(torch.randn_like(p) if signed else torch.rand_like(p))
                if symmetric and p.dim() == 3:
                    p.copy_(p + p.flip(2))
    return modules, shape


def distance() -> float:
    """From the edge, of either sign."""
    return pick((-1.0, 1.0)) * 10 ** uniform(-17, -2)


def scale_(modules: list[nn.Module], factor: float) -> None:
    with torch.no_grad():
        module = next(m for m in modules if any(True for _ in m.parameters()))
        if isinstance(module, DiagonalLowRank):
            module.diagonal.mul_(factor)
            module.left.mul_(factor)
        else:
            module.weight.mul_(factor)  # type: ignore[operator, union-attr]


def radius_edge() -> Edge:
    """Nonnegative weights whose spectral radius is about 1, where the activation does not help."""
    modules, shape = edge_modules(signed=False)
    cell = nn.Sequential(*modules, Inject(), Activate(pick(("relu", "identity"))))
    scale_(modules, (1 + distance()) / radius(channel_product(trace(cell))))
    return Edge(Equilibrium(cell, injection=pick(("given", "softplus"))).to(pick(DTYPES)), shape)


def gain_edge() -> Edge:
    """Weights of any sign whose absolute row sums are about 1."""
    modules, shape = edge_modules(signed=True)
    cell = nn.Sequential(*modules, Inject(), Activate(pick(("relu", "tanh", "identity", "softsign"))))
    scale_(modules, (1 + distance()) / float(exact_gain(trace(cell))))
    return Edge(Equilibrium(cell, injection="free").to(pick(DTYPES)), shape)


def perron_edge() -> Edge:
    """Weights of any sign with row sums of any size, whose absolute values have a spectral radius of about 1."""
    edge = gain_edge()
    modules = list(edge.layer.cell.double())[:-2]
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.mul_(10.0 ** (3 * torch.randn_like(p)))
    found = radius(channel_product(trace(edge.layer.cell), absolute=True))
    slope = exact_slope(trace(edge.layer.cell))
    if 0 < found < math.inf:
        scale_(modules, (1 + distance()) / (found * float(slope)))
    return Edge(edge.layer.to(pick(DTYPES)), edge.shape)


def margin_edge() -> Edge:
    """W whose symmetric part has an eigenvalue of about 1."""
    n = integer(1, 4)
    a = torch.randn(n, n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(a + a.t())
    values = torch.minimum(values, values.new_tensor(1.0)) * 10 ** uniform(-2, 2)
    values[-1] = 1 + distance()
    skew = 10 ** uniform(-3, 3) * torch.randn(n, n, dtype=torch.float64)
    weight = (vectors * values.clamp_max(float(values[-1]))) @ vectors.t() + skew - skew.t()
    linear = nn.Linear(n, n, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weight)
    cell = nn.Sequential(linear, Inject(), Activate(pick(MONOTONE)))
    return Edge(Equilibrium(cell, injection="free").to(pick(DTYPES)), (n,))


DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16)
EDGES: dict[str, Callable[[], Edge]] = {
    "radius edge": radius_edge,
    "gain edge": gain_edge,
    "margin edge": margin_edge,
    "perron edge": perron_edge,
}


def exact_gain(chain: Chain) -> mpf:
    """The product of the exact absolute row sums of the affine steps and the largest slopes."""
    with mpmath.workprec(2600):
        found = mpf(1)
        for step in chain.affine:
            found *= max(sum(row) for row in exact_channels(step, absolute=True))
        return found * exact_slope(chain)


def exact_slope(chain: Chain) -> mpf:
    """The product of the largest slopes."""
    found = mpf(1)
    for activation in (s.activation for s in chain.steps if isinstance(s, ActivationStep)):
        found *= mpf(activation.slope_at_zero)
    return found


def contradicted(certificate: Certificate, chain: Chain) -> bool:
    """Whether the stored tensors do not meet the criterion of the certificate."""
    if certificate.kind == "positive concave":
        linear = all(s.activation.asymptotic_slope > 0 for s in chain.steps if isinstance(s, ActivationStep))
        return linear and not below_one(channel_product(chain))
    if certificate.kind == "bounded gain":
        rate = certificate.rate
        if rate is None or rate >= 1:
            return True
        if certificate.metric == "sup norm":
            return exact_gain(chain) > rate
        with mpmath.workprec(2600):
            scale = exact_slope(chain) / (mpf(rate) * (1 + mpf(2) ** -1000))
            scaled = [[a * scale for a in row] for row in channel_product(chain, absolute=True)]
        return not below_one(scaled)
    if certificate.kind == "monotone operator":
        matrix = channel_product(chain)
        with mpmath.workprec(2600):
            n = len(matrix)
            symmetric = [[(i == j) - (matrix[i][j] + matrix[j][i]) / 2 for j in range(n)] for i in range(n)]
        return not positive_pivots(symmetric)
    if certificate.kind == "subhomogeneous":
        return certificate.rate is None or certificate.rate >= 1
    return True


def below_one(matrix: Matrix) -> bool:
    """Whether the spectral radius of a nonnegative matrix is below 1."""
    with mpmath.workprec(2600):
        return positive_pivots([[(i == j) - a for j, a in enumerate(row)] for i, row in enumerate(matrix)])


def approach(family: str, count: Counter[str]) -> str:
    """Certify one edge, and solve where the radius alone decides."""
    edge = EDGES[family]()
    layer, chain = edge.layer, trace(edge.layer.cell)
    certificate = layer.certificate()
    count["certified for every input"] += bool(certificate)
    false = bool(certificate) and contradicted(certificate, chain)
    if family == "radius edge":
        impossible = not below_one(channel_product(chain))
        dense = len(edge.shape) == 1
        layer.solver = Auto(max_steps=50, on_failure="ignore")
        dtype = torch.float64 if chain.tensors[0].dtype == torch.float64 else torch.float32
        solution = layer.solve(10 * torch.rand(2, *edge.shape, dtype=dtype) + 0.1)
        count["proven"] += bool(solution.proven.all())
        count["no fixed point"] += impossible and dense
        false = false or (impossible and dense and bool(solution.proven.any()))
    count["false certificates"] += false
    weights = [(n, p.detach().double().tolist()) for n, p in layer.cell.named_parameters()]
    return f"{layer.cell}, {certificate}, {weights}"


def approach_graph(family: str, count: Counter[str]) -> str:
    """A propagation whose teleport probability is hardly representable."""
    nodes = integer(1, 4)
    edges = torch.randint(nodes, (2, integer(0, 8)))
    alpha = 10 ** uniform(-17, -2)
    layer = GraphEquilibrium(pick(("relu", "identity")), alpha=alpha, solver=Auto(max_steps=50, on_failure="ignore"))
    x = torch.rand(nodes, 2, dtype=pick((torch.float32, torch.float64)))
    solution = layer.solve(x, edges)
    certificate = layer.certificate()
    _, chain = layer._problem(x, edges, None)
    possible = below_one(channel_product(chain))
    count["certified for every input"] += bool(certificate)
    count["proven"] += bool(solution.proven.all())
    count["no fixed point"] += not possible
    count["false certificates"] += not possible and (bool(certificate) or bool(solution.proven.any()))
    return f"{layer}, {edges.tolist()}, {x.dtype}"


def approach_degree(family: str, count: Counter[str]) -> str:
    """Degrees of shifted activations and of their powers, against the quotient itself."""
    base, shift, power = pick(tuple(ACTIVATIONS)), 10 ** uniform(-6, 1), pick((1.0, uniform(0.05, 1)))
    name = f"({base}+{shift:.9f})^{power:.6f}"
    v = 10 ** torch.linspace(-6, 6, 2000, dtype=torch.float64) * uniform(0.99, 1.01)
    activation = Activate(name).activation
    quotient = float((v * activation.derivative(v) / activation(v)).max())
    claimed = activation_degree(name)
    count["certified for every input"] += claimed < 1
    count["false certificates"] += quotient > claimed * (1 + 1e-12)
    return f"{name}: {claimed!r} against {quotient!r}"


# ------------------------------------------------------------------------------------------------------------- refusals


def narrow() -> nn.Module:
    """A map of a space into another one, under an activation that hides it."""
    name = pick(("tanh", "sigmoid", "tanh+1.2", "relu", "identity"))
    tail = [Inject(), Activate(name)] if chance(0.7) else [Activate(name), Inject()]
    n, m = pick(((2, 3), (3, 2), (1, 4)))
    weight = nn.Linear(n, n, bias=False)
    with torch.no_grad():
        weight.weight = nn.Parameter(torch.empty(m, n))
    modules: list[nn.Module] = pick(
        (
            [nn.Linear(n, m, bias=False)],
            [nn.Conv1d(1, 1, 3, bias=False)],
            [nn.Conv2d(1, 1, 3, bias=False)],
            [nn.Conv1d(1, 1, 3, stride=2, bias=False)],
            [nn.Conv1d(n, m, 3, padding=1, bias=False)],
            [nn.AvgPool1d(2), nn.Conv1d(1, 1, 3, padding=1, bias=False)],
            [weight],
            [nn.Linear(n, n, bias=False), nn.Linear(n, m, bias=False)],
            [nn.Linear(n, m, bias=False), nn.Linear(n, m, bias=False)],
        )
    )
    cell = nn.Sequential(*modules, *tail)
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(10 ** uniform(-3, 0) * torch.rand_like(p) / max(p[0].numel(), 1))
    return cell


def overflowing() -> nn.Module:
    """Weights whose products are not finite, or that are no real numbers."""
    dtype = pick((torch.float32, torch.float64))
    huge = {torch.float32: 1e30, torch.float64: 1e200}[dtype]
    name, kind = (
        pick(("relu", "identity", "relu+0.5")),
        pick(("two", "low rank", "conv", "dense", "nan", "complex", "meta")),
    )
    modules: list[nn.Module]
    if kind == "two":
        modules = [nn.Linear(2, 2, bias=False, dtype=dtype), nn.Linear(2, 2, bias=False, dtype=dtype)]
    elif kind == "low rank":
        modules = [DiagonalLowRank(2, 3, dtype=dtype)]
    elif kind == "conv":
        modules = [nn.Conv1d(2, 2, 3, padding=1, bias=False, dtype=dtype)]
        huge = torch.finfo(dtype).max * 0.9
    elif kind == "dense":
        modules = [nn.Linear(4, 4, bias=False, dtype=dtype)]
        huge = torch.finfo(dtype).max * 0.9
    elif kind == "complex":
        modules = [nn.Linear(2, 2, bias=False, dtype=torch.complex64)]
    elif kind == "meta":
        modules = [nn.Linear(2, 2, bias=False, device="meta")]
    else:
        modules = [nn.Linear(2, 2, bias=False, dtype=dtype)]
    with torch.no_grad():
        for p in modules[0].parameters() if kind not in ("complex", "meta") else ():
            p.fill_(pick((math.nan, math.inf)) if kind == "nan" else huge)
        if kind == "two":
            for p in modules[1].parameters():
                p.fill_(huge)
    return nn.Sequential(*modules, Inject(), Activate(name))


def refuse(family: str, count: Counter[str]) -> str:
    """Certify what has no certificate, as a cell and as layers."""
    cell = narrow() if family == "no self-map" else overflowing()
    subjects: list[nn.Module] = [cell, *(Equilibrium(cell, injection=i) for i in ("given", "softplus", "relu", "free"))]
    certified = [bool(certify(subject)) for subject in subjects]
    count["false certificates"] += any(certified)
    return f"{cell}: {certified}"


class ForeignStep:
    """v -> 10 v, a step of no known class."""

    def __call__(self, v: Tensor) -> Tensor:
        return 10 * v


def refuse_foreign(family: str, count: Counter[str]) -> str:
    """A chain that contracts but for a step nobody knows."""
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(0.5 * torch.eye(2))
    steps = list(trace(nn.Sequential(linear, Inject(), Activate(pick(("tanh", "relu", "tanh+1.2", "sigmoid"))))).steps)
    steps.insert(integer(0, len(steps)), ForeignStep())  # type: ignore[arg-type]
    chain = Chain(tuple(steps))
    rules = {
        "positive concave": lambda: derive(chain, (Sign.POSITIVE,), (PositiveConcave(),)).certificate,
        "contracting": lambda: derive(chain, (Sign.NONNEGATIVE,), THEORIES[1:]).certificate,
        "contracting, free": lambda: derive(chain, (Sign.ANY,), THEORIES[1:]).certificate,
        "gain": lambda: gain(chain) < 1,
        "degree": lambda: degree(chain) < 1,
        "margin": lambda: margin(chain) > 0,
        "rounding": lambda: chain.rounding(torch.float64).relative < math.inf,
    }
    certified = [name for name, rule in rules.items() if not refuses(rule)]
    count["false certificates"] += bool(certified)
    return f"{certified}: {chain}"


def refuses(rule: Callable[[], Any]) -> bool:
    try:
        return not rule()
    except Refusal:
        return True


SEARCHED = ("nonnegative", "normalised", "signed", "bounded", "inhibition", "monotone", "nearly monotone")
FAMILIES: dict[str, Callable[[str, Counter[str]], str]] = {
    **dict.fromkeys(SEARCHED, search),
    **dict.fromkeys(EDGES, approach),
    "graph edge": approach_graph,
    "degree edge": approach_degree,
    "no self-map": refuse,
    "overflow": refuse,
    "foreign step": refuse_foreign,
}


def attempt(k: int, seed: int) -> tuple[str, Counter[str], str]:
    """The family of map k, its counts, and what it was."""
    torch.manual_seed(seed * 1_000_003 + k)
    family = tuple(FAMILIES)[k % len(FAMILIES)]
    count: Counter[str] = Counter(maps=1)
    try:
        detail = FAMILIES[family](family, count)
    except Exception:
        count["exceptions"] += 1
        detail = traceback.format_exc(limit=-3)
    return family, count, detail


@torch.no_grad()
def measure(maps: int, seed: int = 0, progress: bool = False) -> dict[str, dict[str, Any]]:
    """Counts for each family, with the first map that was wrong; map k is the same for every number of maps."""
    results: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    first: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES}
    began = time.monotonic()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k in range(maps):
            family, count, detail = attempt(k, seed)
            results[family].update(count)
            for wrong in ("false certificates", "exceptions"):
                if count[wrong]:
                    first[family].setdefault(f"first of {wrong}", {"map": k, "detail": detail})
            if progress and (k + 1) % 2000 == 0:
                false = sum(r["false certificates"] for r in results.values())
                print(f"{k + 1:>8} maps, {time.monotonic() - began:.0f} s: {false} false", file=sys.stderr, flush=True)
    return {family: {**count, **first[family]} for family, count in results.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="K", help="the map of this number alone, in full")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.only is not None:
        with torch.no_grad():
            family, count, detail = attempt(arguments.only, arguments.seed)
        print(family, dict(count), detail, sep="\n")
        return int(bool(count["false certificates"]))
    result = measure(arguments.maps, arguments.seed, progress=True)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, {"seed": arguments.seed, **result})
    return int(any(r.get("false certificates", 0) for r in result.values()))


if __name__ == "__main__":
    sys.exit(main())
