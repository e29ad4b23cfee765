"""Evaluations of f until the true entrywise relative error is at most 1e-4: certified stop against plain Picard.

For every map, per sample: `default` is what `Auto()` takes and `certified` what `Picard()` takes, proof included.
`oracle` is the first plain Picard step whose true error (against float64) is small enough: no stopping rule can tell
that. `residual` is plain Picard stopped by the loosest relative residual, from 1e-1 down by halves, at which every
sample's true error is at most 1e-4: a tolerance that nobody knows beforehand. `ratio` is default/residual. `best` is what
the best of all solvers takes, which `Auto` should not miss by more than a factor of two.

    python benchmarks/evaluations.py --output benchmarks/results/evaluations.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perron._files import write_json
from perron.cells import Activate, Inject, trace
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, Broyden, Newton, Picard

TARGET = 1e-4
LIMIT = 5000


def layer_of(weight: Tensor, activation: str, *, outside: bool = False) -> Equilibrium:
    """z = sigma(W z + b), or sigma(W z) + b."""
    linear = nn.Linear(*weight.shape, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    rest = (Activate(activation), Inject()) if outside else (Inject(), Activate(activation))
    return Equilibrium(nn.Sequential(linear, *rest))


def _random(width: int, radius: float, density: float = 1.0) -> Tensor:
    weight = torch.rand(width, width) * (torch.rand(width, width) < density)
    return weight * (radius / float(torch.linalg.eigvals(weight).abs().max()))


def layer_with_radius(width: int, radius: float, activation: str, density: float = 1.0) -> Equilibrium:
    return layer_of(_random(width, radius, density), activation)


def problems() -> list[tuple[str, Equilibrium, Tensor]]:
    """Radius 1 with injections c softplus(randn, beta=5): the smaller c, the harder; and other shapes of maps."""
    softplus = torch.nn.functional.softplus
    found = []
    for label, c in (("easy", 1.8), ("middle", 0.15), ("hard", 0.019)):
        b = c * softplus(torch.randn(128, 256), beta=5)
        found.append((f"dense 256 tanh, {label}", layer_with_radius(256, 1.0, "tanh"), b))
    found.append(("dense 80 sigmoid, radius 4", layer_with_radius(80, 4.0, "sigmoid"), torch.randn(128, 80).relu()))
    found.append(
        ("dense 80 softsign, radius 3", layer_with_radius(80, 3.0, "softsign"), softplus(torch.randn(128, 80), beta=5))
    )
    spread = 10 ** (-8 * torch.rand(128, 80))
    found.append(("20 % dense 80 tanh, b 1e-8 to 1", layer_with_radius(80, 1.0, "tanh", 0.2), spread))
    small = torch.full((4, 20), 1.3e-3)
    diagonal = torch.diag(torch.linspace(0.5, 0.99, 20))
    found.append(("0.99 I 20 tanh, b outside", layer_of(0.99 * torch.eye(20), "tanh", outside=True), small))
    found.append(("dense 20 tanh, b outside", layer_of(_random(20, 0.99), "tanh", outside=True), small))
    found.append(("diagonal 20 tanh, b outside", layer_of(diagonal, "tanh", outside=True), small))
    found.append(("diagonal 20 tanh", layer_of(diagonal, "tanh"), small))
    found.append(("power control, 20 stations", layer_of(_random(20, 0.99), "identity"), torch.rand(4, 20) + 0.01))
    links = torch.diag(torch.ones(149), 1)
    links = links + links.t()
    walk = layer_of(0.99 * links / links.sum(0), "identity")
    found.append(("PageRank of a path of 150", walk, torch.rand(4, 150) / 150 + 1e-3))
    return found


@torch.no_grad()
def measure(layer: Equilibrium, b: Tensor) -> dict[str, Any]:
    chain, exact_b = trace(layer.cell).to(torch.float64), b.double()
    exact = torch.zeros_like(exact_b)
    for _ in range(LIMIT):
        exact, before = chain(exact, exact_b), exact
        if bool((exact == before).all()):
            break
    errors, residuals = [], []
    z = torch.zeros_like(exact)
    for _ in range(LIMIT):
        new = chain(z, exact_b)
        residuals.append((new - z).abs().amax(1) / new.abs().amax(1))
        errors.append(((new - exact).abs() / exact).amax(1))
        z = new
        if bool((errors[-1] <= TARGET / 100).all()):
            break
    error, residual = torch.stack(errors), torch.stack(residuals)
    oracle = (error <= TARGET).float().argmax(0) + 1
    tolerance = 0.1
    while True:
        at = (residual <= tolerance).float().argmax(0)
        if bool((error.gather(0, at[None])[0] <= TARGET).all()) or tolerance < 1e-12:
            break
        tolerance /= 2
    layer.solver = Picard(tol=TARGET, max_steps=600, on_failure="ignore")
    picard = layer.solve(b)
    others = {}
    for make in (Anderson, Broyden, Newton):
        layer.solver = make(tol=TARGET, max_steps=600, on_failure="ignore")
        found = layer.solve(b)
        if found.converged.all():
            others[make.__name__] = float(found.steps.double().mean())
    if picard.converged.all():
        others["Picard"] = float(picard.steps.double().mean())
    layer.solver = Auto(tol=TARGET, max_steps=600)
    solution = layer.solve(b)
    true = ((solution.value.double() - exact).abs() / exact).amax(1)
    return {
        "default": float(solution.steps.double().mean()),
        "certified": float(picard.steps.double().mean()),
        "others": others,
        "ratio_to_best": float(solution.steps.double().mean()) / min(others.values()),
        "oracle": float(oracle.double().mean()),
        "residual": float((at + 1).double().mean()),
        "residual_tolerance": tolerance,
        "largest_true_error": float(true.max()),
        "bound_over_true_error": float((solution.error_bound / true).median()),
        "ratio_to_residual": float(solution.steps.double().mean() / (at + 1).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = {name: measure(layer, b) for name, layer, b in problems()}
    print(
        f"{'map':34}{'default':>9}{'certified':>10}{'best':>7}{'residual':>10}{'oracle':>8}{'ratio':>7}"
        f"{'true error':>12}{'bound/true':>12}"
    )
    for name, row in rows.items():
        print(
            f"{name:34}{row['default']:9.1f}{row['certified']:10.1f}{min(row['others'].values()):7.1f}{row['residual']:10.1f}{row['oracle']:8.1f}{row['ratio_to_residual']:7.2f}"
            f"{row['largest_true_error']:12.1e}{row['bound_over_true_error']:12.2f}"
        )
    if arguments.output:
        write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
