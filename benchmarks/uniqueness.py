"""False certificates: random maps that contract or are monotone, and a search for second fixed points of each.

Families: subhomogeneous maps with nonnegative weights, normalised or not, some with negative injections; signed weights,
plain, with bounded rows, and near the counterexamples with two fixed points (mutual inhibition, W = [[a, -b], [-c, d]]);
monotone operators, and matrices that are nearly monotone. Each is solved once with the default solver. From many random
starts Picard steps, damped and not, and Newton steps then look for fixed points in float64; a certificate is false if
one lies outside of a proven enclosure, or if two of them are found where something was proven.

    python benchmarks/uniqueness.py --maps 20000 --output benchmarks/results/uniqueness.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from perron._files import write_json
from perron.cells import Activate, Chain, Inject, Normalize, trace
from perron.constraints import BoundedRows, MonotoneOperator
from perron.nn import Equilibrium
from perron.solvers import Auto

FAMILIES = ("nonnegative", "normalised", "signed", "bounded", "inhibition", "monotone", "nearly monotone")
SHIFTED = ("tanh+1.2", "tanh+1.05", "tanh+1.603", "softsign+1.1", "sigmoid", "(tanh+1.2)^0.5", "arctan+1.7")
MONOTONE = ("relu", "tanh", "sigmoid", "softsign", "identity")
STARTS = 40


def random_map(family: str, generator: torch.Generator) -> tuple[Equilibrium, Tensor]:
    """A layer and one injection, (1, n)."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def pick(names: tuple[str, ...]) -> str:
        return names[int(draw(0, len(names) - 1e-9))]

    n = 2 if family == "inhibition" else 1 + int(draw(0, 6))
    uniform = torch.rand(n, n, generator=generator, dtype=torch.float64)
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64)
    other = torch.randn(n, n, generator=generator, dtype=torch.float64)
    scale, name = 10 ** draw(-1.5, 1.5), pick(SHIFTED)
    modules: list[nn.Module] = [Activate(name), Inject()]
    b = 10 ** draw(-2, 0.5) * torch.rand(1, n, generator=generator, dtype=torch.float64)
    if family in ("nonnegative", "normalised"):
        weight = scale * uniform
        if draw(0, 1) < 0.3:
            # The fixed point may then be negative.
            b = b - 4 * draw(0, 1)
    elif family == "bounded":
        weight = BoundedRows(0.9)(normal)
        modules = [Inject(), Activate(pick(MONOTONE))]
        b = b - 0.5
    elif family == "inhibition":
        weight = scale * (1 + 0.3 * normal) * torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        b = b * draw(0, 1) ** 3
    elif family == "signed":
        weight = 0.3 * scale * normal
    else:
        margin = 10 ** draw(-3, 0)
        weight = MonotoneOperator(margin)(0.2 * scale * normal, 0.2 * scale * other)
        if family == "nearly monotone":
            weight = weight + torch.eye(n, dtype=torch.float64) * margin * draw(0.5, 3)
        modules = [Inject(), Activate(pick(MONOTONE))]
        b = 4 * (b - 0.5)
    if family == "normalised" or (family == "signed" and draw(0, 1) < 0.2):
        modules.append(Normalize((1.0, 2.0, math.inf)[int(draw(0, 2.999))]))
    linear = nn.Linear(n, n, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return Equilibrium(nn.Sequential(linear, *modules), injection="free"), b


def fixed_points(chain: Chain, b: Tensor, generator: torch.Generator) -> Tensor:
    """(count, n): distinct points with F(z) = z to 1e-10, as far as they were found."""
    n = b.shape[1]
    b = b.expand(STARTS, n)
    spread = 10 ** (3 * torch.rand(STARTS, 1, generator=generator, dtype=b.dtype) - 1)
    z = spread * (torch.rand(STARTS, n, generator=generator, dtype=b.dtype) - 0.2)
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
                jacobian = next(d for d in chain.linearize_steps(y, b).diagonals if d is not None).unsqueeze(2) * weight
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


@torch.no_grad()
def measure(maps: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Counts for each family."""
    generator = torch.Generator().manual_seed(seed)
    results: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    for k in range(maps):
        family = FAMILIES[k % len(FAMILIES)]
        layer, b = random_map(family, generator)
        layer.solver = Auto(max_steps=2000, on_failure="ignore")
        certified, solution = bool(layer.certificate()), layer.solve(b)
        points = fixed_points(trace(layer.cell), b, generator)
        proven, count = bool(solution.proven.all()), results[family]
        count["maps"] += 1
        count["certified for every input"] += certified
        count["proven"] += proven
        count["not converged though proven"] += proven and not bool(solution.converged.all())
        count["several fixed points found"] += len(points) > 1
        if proven:
            assert solution.lower is not None
            assert solution.upper is not None
            slack = 1e-8 * (1 + points.abs())
            outside = ((points < solution.lower - slack) | (points > solution.upper + slack)).any()
            count["false certificates"] += bool(outside) or len(points) > 1
        count["false certificates"] += certified and (len(points) > 1 or not proven)
    return {family: dict(count) for family, count in results.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = measure(arguments.maps, arguments.seed)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, {"seed": arguments.seed, **result})
    return int(any(r.get("false certificates", 0) for r in result.values()))


if __name__ == "__main__":
    sys.exit(main())
