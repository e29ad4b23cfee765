"""Soundness and tightness of the enclosures on random cells.

Every activation, widths 1 to 200, weight scales 0 to 100, injections 1e-9 to 1e3, float32 and float64. An enclosure is
wrong if the float64 reference (Picard, then Newton) lies outside it by more than the reference's own error.

    python benchmarks/soundness.py --samples 40000 --output benchmarks/results/soundness.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from perron._files import write_json
from perron.activations import ACTIVATIONS
from perron.cells import Activate, Chain, Inject, trace
from perron.certificates import derive
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, Broyden, IterativeSolver, MonotoneNewton, Picard

BATCH = 10


def reference(chain: Chain, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed point in float64 and an estimate of its error, (batch, n) each, for a one-layer dense chain.

    Picard from below, then Newton kept above those lower points; where Newton does not settle, Picard alone goes on.
    """
    chain, b = chain.to(torch.float64), b.double()
    low = torch.zeros_like(b)
    for _ in range(400):
        low = chain(low, b)
    weight = chain.affine[0].weights[0]
    eye = torch.eye(b.shape[1], dtype=torch.float64)

    def system(z: Tensor) -> Tensor:
        diagonal = chain.linearize(z, b).diagonals[-1]
        assert diagonal is not None
        return eye - diagonal.unsqueeze(-1) * weight

    z = low
    for _ in range(30):
        z = torch.maximum(z + torch.linalg.solve(system(z), chain(z, b) - z), low)
    settled = ((chain(z, b) - z).abs() <= 1e-14 * z).all(1, keepdim=True)
    z = torch.where(settled, z, low)
    for _ in range(200_000):
        if bool(((chain(z, b) - z).abs() <= 1e-14 * z).all()):
            break
        z = torch.where(settled, z, chain(z, b))
    residual = (chain(z, b) - z).abs()
    if not bool((residual <= 1e-10 * z).all()):
        raise RuntimeError("the reference itself did not converge")
    error = torch.linalg.solve(system(z), residual + 1e-15 * z * math.sqrt(b.shape[1])).abs() * 2
    return z, error


def random_problem(generator: torch.Generator, name: str, dtype: torch.dtype) -> tuple[Equilibrium, Tensor]:
    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    n = round(10 ** draw(0, math.log10(200)))
    scale = 0.0 if draw(0, 1) < 0.05 else 10 ** draw(-3, 2)
    if ACTIVATIONS[name].asymptotic_slope > 0:
        scale = min(scale, draw(0, 0.999))
    weight = torch.rand(n, n, generator=generator, dtype=dtype)
    if draw(0, 1) < 0.3:
        weight = weight * (torch.rand(n, n, generator=generator) < 0.2)
    weight = weight / weight.sum(1, keepdim=True).amax().clamp_min(1e-30) * scale
    low = draw(-9, 2)
    b = 10 ** (low + (draw(low, 3) - low) * torch.rand(BATCH, n, generator=generator, dtype=torch.float64))
    linear = nn.Linear(n, n, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    cell = nn.Sequential(linear, Inject(), Activate(name))
    return Equilibrium(cell), b.to(dtype)


SOLVERS: dict[str, type[IterativeSolver]] = {
    "auto": Auto,
    "picard": Picard,
    "anderson": Anderson,
    "newton": MonotoneNewton,
    "broyden": Broyden,
}


def measure(
    samples: int, seed: int = 0, tols: tuple[float, ...] = (1e-2, 1e-4, 1e-6), solver: str = "auto"
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    kinds = [(name, dtype) for name in ACTIVATIONS for dtype in (torch.float32, torch.float64)]
    counts = {"samples": 0, "proven": 0, "misses": 0, "bound_below_error": 0, "not_converged": 0, "refused": 0}
    tightness: dict[float, list[Tensor]] = {tol: [] for tol in tols}
    steps: dict[float, list[Tensor]] = {tol: [] for tol in tols}
    cells = math.ceil(samples / BATCH)
    for k in range(cells):
        name, dtype = kinds[k % len(kinds)]
        layer, b = random_problem(generator, name, dtype)
        chain = trace(layer.cell)
        if not derive(chain, positive_injection=True):
            counts["refused"] += BATCH
            continue
        truth, error = (t.detach() for t in reference(chain, b))
        tol = tols[(k // len(kinds)) % len(tols)]
        layer.solver = SOLVERS[solver](tol=tol, max_steps=500, on_failure="ignore")
        s = layer.solve(b)
        assert s.lower is not None
        assert s.upper is not None
        proven = s.error_bound.isfinite()
        outside = (s.lower.double() > truth + error) | (s.upper.double() < truth - error)
        true_error = ((s.value.double() - truth).abs() / truth).amax(1)
        true_error_low = (((s.value.double() - truth).abs() - error).clamp_min(0) / truth).amax(1)
        counts["samples"] += len(b)
        counts["proven"] += int(proven.sum())
        counts["not_converged"] += int((~s.converged).sum())
        counts["misses"] += int((outside.any(1) & proven).sum())
        counts["bound_below_error"] += int(((s.error_bound < true_error_low) & proven).sum())
        known = proven & s.converged & (true_error > 10 * (error / truth).amax(1))
        tightness[tol].append((s.error_bound / true_error)[known])
        steps[tol].append(s.steps[s.converged].double())
    summary: dict[str, object] = dict(counts)
    summary["seed"], summary["solver"] = seed, solver
    summary["bound_over_true_error_median"] = {
        f"{t:g}": round(float(torch.cat(v).median()), 3) for t, v in tightness.items() if v
    }
    summary["median_evaluations"] = {f"{t:g}": float(torch.cat(v).median()) for t, v in steps.items() if v}
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver", choices=sorted(SOLVERS), default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.samples, arguments.seed, solver=arguments.solver)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)
    return int(bool(result["misses"] or result["bound_below_error"]))


if __name__ == "__main__":
    sys.exit(main())
