"""Forward and forward+backward at equal true error: Perron, torchdeq, the common hook recipe, and bare products.

Maps: z = tanh(W z + b), W random nonnegative, scaled to spectral radius 1 (convolutions: their channel matrix), and
b = c softplus(randn, beta=5): the smaller c, the longer Picard takes. Near the critical scale with a small injection the
map is hard. c is found so that Picard needs about 8, 20 and 60 steps for an entrywise relative error of 1e-4.

The true error is entrywise and relative to a float64 solution. Every baseline gets the loosest tolerance, of 0.1 and its
halves, at which every sample's true error is at most 1e-4; its backward tolerance is the loosest at which its gradient
of b, against the float64 adjoint, is right to 1e-4 of its norm, or to twice Perron's error where that is more. A baseline
that reaches neither is shown as such.

`floor` is the time of as many bare products (or convolutions) as Perron's default took, all of them in float32, forward;
with backward it adds its adjoint products, one evaluation and the gradient of W. Times are medians over rounds in which
every method runs once, in turn, on a fixed number of threads.

Cases that the output has already stay there unless they are measured again.

    python benchmarks/speed.py --output benchmarks/results/speed.json [--full] [--missing]
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from baselines import BASELINES, Cell, counts
from torch import Tensor, nn

from perron._files import read_json, write_json
from perron.cells import Activate, Inject
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, Broyden, Compiled, Newton, Picard
from perron.studies.images import peak_memory

TARGET = 1e-4
STEPS = {"easy": 8, "middle": 20, "hard": 60}
SOLVERS: dict[str, Any] = {
    "Auto": Auto,
    "Compiled": Compiled,
    "Picard": Picard,
    "Anderson": Anderson,
    "Newton": Newton,
    "Broyden": Broyden,
}


@dataclass
class Case:
    """One map and its injections, with the float64 truth.

    Attributes:
        weight: (width, width), or (channels, channels, 3, 3).
        b: (batch, width) or (batch, channels, height, width).
        value, gradient: float64 fixed point, and the gradient of <v, z*> with respect to b.
    """

    name: str
    weight: Tensor
    b: Tensor
    v: Tensor
    value: Tensor
    gradient: Tensor
    picard_steps: int

    def error(self, value: Tensor) -> float:
        return float(((value.double() - self.value).abs() / self.value).max())

    def gradient_error(self, gradient: Tensor) -> float:
        """Largest error of a sample's gradient, relative in the Euclidean norm."""
        difference = (gradient.double() - self.gradient).flatten(1).norm(dim=1)
        return float((difference / self.gradient.flatten(1).norm(dim=1)).max())


def _linear(z: Tensor, weight: Tensor) -> Tensor:
    return F.linear(z, weight) if weight.dim() == 2 else F.conv2d(z, weight, padding=1)


def _transposed(g: Tensor, weight: Tensor) -> Tensor:
    return g @ weight if weight.dim() == 2 else F.conv_transpose2d(g, weight, padding=1)


def _accelerated(step: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """A float64 fixed point to rounding, by Picard steps with Aitken's extrapolation of the slowest mode now and then."""
    for k in range(1, 4000):
        new = step(z)
        d = new - z
        if float((d.abs() / new.abs().clamp_min(1e-300)).max()) < 1e-14:
            return new
        if k % 12 == 0:
            e = step(new) - new
            ratio = ((e * d).flatten(1).sum(1) / (d * d).flatten(1).sum(1).clamp_min(1e-300)).clamp(0, 0.999)
            new = new + e / (1 - ratio.view(-1, *[1] * (z.dim() - 1)))
        z = new
    return z


def _picard_steps(weight: Tensor, b: Tensor) -> int:
    """Steps of Picard from zero until the true error is at most the target, for the slowest of the samples."""
    weight, b = weight.double(), b.double()
    exact = _accelerated(lambda z: torch.tanh(_linear(z, weight) + b), torch.tanh(b))
    z, steps = torch.zeros_like(b), 0
    while steps < 500 and float(((z - exact).abs() / exact).max()) > TARGET:
        z, steps = torch.tanh(_linear(z, weight) + b), steps + 1
    return steps


def make_case(kind: str, size: int, image: int, batch: int, level: str, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    shape = (size,) if kind == "dense" else (size, image, image)
    if kind == "dense":
        weight = torch.rand(size, size, generator=generator)
        matrix = weight
    else:
        weight = torch.rand(size, size, 3, 3, generator=generator)
        matrix = weight.sum((2, 3))
    vector = torch.ones(size)
    for _ in range(50):
        vector = F.normalize(matrix @ vector, dim=0)
    weight = weight / float(vector @ (matrix @ vector))
    raw = F.softplus(torch.randn(batch, *shape, generator=generator), beta=5)
    few = raw[: min(batch, 8)]
    # More steps for a smaller injection: bisection on its logarithm.
    low, high = -8.0, 3.0
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if _picard_steps(weight, 10**middle * few) > STEPS[level] else (low, middle)
    b = 10**high * raw
    v = torch.randn(b.shape, generator=generator)
    w64, b64 = weight.double(), b.double()
    value = _accelerated(lambda z: torch.tanh(_linear(z, w64) + b64), torch.tanh(b64))
    slope = 1 - value.square()
    adjoint = _neumann(lambda g: _transposed(slope * g, w64), v.double())
    name = named(kind, size, image, batch, level)
    return Case(name, weight, b, v, value, slope * adjoint, _picard_steps(weight, 10**high * few))


def _neumann(product: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """g = product(g) + v in float64, to rounding."""
    g, d = v, v
    for _ in range(4000):
        d = product(d)
        g = g + d
        if float((d.flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)).max()) < 1e-14:
            break
    return g


# ----------------------------------------------------------------------------------------------------------- contestants


class Contestant:
    """A method on a case: `forward()` and `both()` run it; `facts()` tells what it did."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.b = case.b.clone().requires_grad_()

    def solve(self) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.solve()

    def both(self) -> Tensor:
        self.b.grad = None
        self.weight.grad = None
        value = self.solve()
        value.backward(self.case.v)
        return value

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    def check(self) -> dict[str, Any]:
        value = self.both()
        assert self.b.grad is not None
        return {
            "error": self.case.error(value.detach()),
            "gradient_error": self.case.gradient_error(self.b.grad),
            **self.steps(),
        }

    def steps(self) -> dict[str, float]:
        raise NotImplementedError


class Perron(Contestant):
    def __init__(self, case: Case, solver: Any) -> None:
        super().__init__(case)
        size = case.weight.shape[0]
        linear: nn.Module = nn.Linear(size, size, bias=False)
        if case.weight.dim() > 2:
            linear = nn.Conv2d(size, size, 3, padding=1, bias=False)
        linear.weight = nn.Parameter(case.weight.clone())
        self.layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("tanh")), solver=solver)

    @property
    def weight(self) -> Tensor:
        return self.layer.cell[0].weight  # type: ignore[index, return-value]

    def solve(self) -> Tensor:
        return self.layer(self.b)

    def steps(self) -> dict[str, Any]:
        solution = self.layer.last_solution
        assert solution is not None
        assert solution.adjoint is not None
        return {
            "forward_steps": float(solution.steps.double().mean()),
            "backward_steps": float(solution.adjoint.steps.double().mean()),
            "certified": solution.certified,
            "error_bound": float(solution.error_bound.max()),
            "adjoint_error_bound": float(solution.adjoint.error_bound.max()),
        }


class Baseline(Contestant):
    def __init__(self, case: Case, name: str) -> None:
        super().__init__(case)
        self.cell = Cell(nn.Parameter(case.weight.clone()))
        self.baseline = BASELINES[name]()
        self.tol = self.backward_tol = 0.1

    @property
    def weight(self) -> Tensor:
        return self.cell.weight

    def solve(self) -> Tensor:
        return self.baseline(self.cell, self.b, self.tol, self.backward_tol)

    def calibrate(self, gradient_goal: float, patience: float) -> bool:
        """The loosest tolerances that are good enough; False where there are none, or it takes too long to tell."""
        start = time.perf_counter()
        while self.case.error(self.forward()) > TARGET:
            self.tol /= 2
            if self.tol < 1e-7 or time.perf_counter() - start > patience:
                return False
        while self.check()["gradient_error"] > gradient_goal:
            self.backward_tol /= 2
            if self.backward_tol < 1e-7 or time.perf_counter() - start > patience:
                return False
        return True

    def steps(self) -> dict[str, Any]:
        counts.clear()
        self.both()
        return {
            "forward_steps": float(counts["forward"]),
            "backward_steps": float(counts["backward"]),
            "tol": self.tol,
            "backward_tol": self.backward_tol,
        }


def floor(case: Case, forward: float, backward: float) -> tuple[Callable[[], None], Callable[[], None]]:
    """As many bare products."""
    z, weight, g = case.b, case.weight, case.v

    def of_forward() -> None:
        for _ in range(round(forward)):
            _linear(z, weight)

    def of_both() -> None:
        of_forward()
        for _ in range(round(backward)):
            _transposed(g, weight)
        _linear(z, weight)
        if weight.dim() == 2:
            g.t() @ z
        else:
            torch.nn.grad.conv2d_weight(z, weight.shape, g, padding=1)

    return of_forward, of_both


# ------------------------------------------------------------------------------------------------------------- measuring


def interleaved(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, over rounds in which each runs once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while True:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds = len(next(iter(times.values())))
        if rounds >= 3 and (time.perf_counter() - begin > seconds or rounds >= 200):
            return {name: statistics.median(t) for name, t in times.items()}


def measure(case: Case, seconds: float, *, compiled: bool) -> dict[str, Any]:
    contestants: dict[str, Contestant] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in SOLVERS.items():
        if name == "Compiled" and not (compiled and case.weight.dim() == 2):
            continue
        contestant = Perron(case, make(tol=TARGET, max_steps=400, on_failure="ignore"))
        for _ in range(4 if name == "Compiled" else 1):
            rows[name] = contestant.check()
        contestants[name] = contestant
    goal = max(2 * rows["Auto"]["gradient_error"], TARGET)
    for name in BASELINES:
        baseline = Baseline(case, name)
        try:
            if baseline.calibrate(goal, patience=max(12 * seconds, 90)):
                contestants[name] = baseline
            rows[name] = {"reached": name in contestants, **baseline.check()}
        except RuntimeError as error:
            rows[name] = {"reached": False, "failure": str(error).split("\n")[0][:100]}
    of_forward, of_both = floor(case, rows["Auto"]["forward_steps"], rows["Auto"]["backward_steps"])
    forward = interleaved({"floor": of_forward, **{n: c.forward for n, c in contestants.items()}}, seconds)
    both = interleaved({"floor": of_both, **{n: c.both for n, c in contestants.items()}}, seconds)
    rows["floor"] = {}
    for name in forward:
        rows[name] |= {"forward_ms": forward[name], "both_ms": both[name]}
        if name != "floor":
            rows[name]["peak_mib"] = peak_memory(contestants[name].both)
    return {"case": case.name, "picard_steps": case.picard_steps, "methods": rows}


def grid(full: bool) -> list[tuple[str, int, int, int, str]]:
    found = []
    for width in (80, 256, 1024, 2048):
        for batch in (64, 128, 1024):
            for level in STEPS:
                heavy = width * batch > 300_000 or (width == 2048 and level == "hard")
                if full or not (heavy or (width >= 1024 and batch == 64)):
                    found.append(("dense", width, 0, batch, level))
    for channels, image in ((32, 16), (82, 28)):
        found += [("conv", channels, image, 64, level) for level in STEPS if full or channels == 32 or level == "easy"]
    return found


def named(kind: str, size: int, image: int, batch: int, level: str) -> str:
    label = f"dense {size}" if kind == "dense" else f"conv {size}x{image}x{image}"
    return f"{label}, batch {batch}, {level}"


def ratio(rows: dict[str, Any], key: str) -> tuple[float, str]:
    """Time of the best baseline over that of Perron's default, and the baseline's name."""
    times = {n: rows[n][key] for n in BASELINES if key in rows.get(n, {})}
    if not times:
        return math.nan, "-"
    best = min(times, key=times.__getitem__)
    return times[best] / rows["Auto"][key], best


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| case (Picard's steps) | evaluations, adjoint products: Auto | forward ms: Auto, Compiled, best baseline, floor "
        "| with backward ms: Auto, Compiled, best baseline, floor | baseline/Auto | baseline/Compiled |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = result["methods"]
        cells = []
        for key in ("forward_ms", "both_ms"):
            _, best = ratio(rows, key)
            shown = [rows.get(n, {}).get(key) for n in ("Auto", "Compiled", best, "floor")]
            text = ", ".join("-" if t is None else f"{t:.3g}" for t in shown)
            cells.append(f"{text} ({best})")
        auto = [ratio(rows, k)[0] for k in ("forward_ms", "both_ms")]
        fast = [
            r * rows["Auto"][k] / rows["Compiled"][k] if "Compiled" in rows else math.nan
            for r, k in zip(auto, ("forward_ms", "both_ms"), strict=True)
        ]
        counted = f"{rows['Auto']['forward_steps']:.1f}, {rows['Auto']['backward_steps']:.1f}"
        ratios = [", ".join("-" if math.isnan(r) else f"{r:.1f}x" for r in pair) for pair in (auto, fast)]
        lines.append(f"| {result['case']} ({result['picard_steps']}) | {counted} | {' | '.join([*cells, *ratios])} |")
    return "\n".join(lines)


def kept_results(output: Path, how: dict[str, Any], *, needed: bool) -> list[dict[str, Any]]:
    """Earlier results for the same table, which must have been measured alike; else it begins anew, unless they are needed."""
    found = read_json(output) or {}
    other = [name for name in how if found.get(name) != how[name]]
    if other and needed and output.exists():
        sys.exit(
            f"{output} is damaged, or was measured with another {', '.join(other)}: name another, or leave nothing out"
        )
    return [] if other else found["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--missing", action="store_true", help="only cases that the output does not have yet")
    parser.add_argument("--full", action="store_true", help="every width with every batch and level")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, for each case and direction")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="leave `Compiled` out")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    cases = [c for c in grid(arguments.full) if arguments.only in named(*c)]
    output: Path | None = arguments.output
    how = {
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "target": TARGET,
    }
    kept = kept_results(output, how, needed=bool(arguments.missing or arguments.only)) if output else []
    if arguments.missing:
        cases = [c for c in cases if named(*c) not in {r["case"] for r in kept}]
    order = [named(*c) for c in grid(True)]
    results: list[dict[str, Any]] = []
    for number, (kind, size, image, batch, level) in enumerate(cases, 1):
        begin = time.perf_counter()
        torch._dynamo.reset()
        case = make_case(kind, size, image, batch, level)
        results.append(measure(case, arguments.seconds, compiled=not arguments.no_compile))
        print(table(results[-1:]).split("\n")[-1], flush=True)
        print(f"{number}/{len(cases)}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        if output:
            measured = {r["case"] for r in results}
            every = results + [r for r in kept if r["case"] not in measured]
            record = {**how, "results": sorted(every, key=lambda r: order.index(r["case"]))}
            write_json(output, record)
    print(table(results))


if __name__ == "__main__":
    main()
