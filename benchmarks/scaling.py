"""How time and memory grow with width, batch, steps and number of layers: Perron, the hook recipe, and bare products.

Maps as in speed.py, of middle hardness (Picard takes about 20 steps). The hook runs to relative residuals of 1e-5, which
serves there. Memory is the most that is alive at once in a forward and backward pass beyond inputs and weights; over
the steps it is that of a solve forced to 10, 100 and 1,000 of them, beside the same loop unrolled by autograd.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import Baseline, Case, Perron, floor, interleaved, make_case, peak_memory
from torch import Tensor, nn

from perron._files import write_json
from perron.nn import PositiveConcaveLinear
from perron.solvers import Auto, Picard

WIDTHS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (16, 64, 256, 1024, 2048)
STEPS = (10, 100, 1000)
LAYERS = (1, 2, 4, 8)


def _against(case: Case, seconds: float) -> dict[str, Any]:
    ours, baseline = Perron(case, Auto(max_steps=400)), Baseline(case, "hook")
    baseline.tol = baseline.backward_tol = 1e-5
    facts = ours.check()
    _, bare = floor(case, facts["forward_steps"], facts["backward_steps"])
    times = interleaved({"Auto": ours.both, "hook": baseline.both, "floor": bare}, seconds)
    memory = {"Auto": peak_memory(ours.both), "hook": peak_memory(baseline.both)}
    return {"ms": times, "mib": memory, "steps": facts["forward_steps"] + facts["backward_steps"]}


def over_steps() -> dict[str, Any]:
    found: dict[str, Any] = {}
    b = torch.rand(128, 256, requires_grad=True)
    weight = torch.rand(256, 256) / 256
    for steps in STEPS:
        solver = Picard(tol=1e-30, stop="residual", max_steps=steps, on_failure="ignore")
        layer = PositiveConcaveLinear(256, 256, injection="given", solver=solver)

        def implicit(layer: nn.Module = layer) -> None:
            layer(b).sum().backward()

        def unrolled(steps: int = steps) -> None:
            w = weight.clone().requires_grad_()
            z = torch.zeros_like(b)
            for _ in range(steps):
                z = torch.tanh(z @ w.t() + b)
            z.sum().backward()

        found[str(steps)] = {"mib": {"implicit": peak_memory(implicit), "unrolled": peak_memory(unrolled)}}
    return found


def over_layers(seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    x = torch.randn(128, 256)
    runs: dict[str, Callable[[], Any]] = {}
    for count in LAYERS:
        network = nn.Sequential(*(PositiveConcaveLinear(256, 256, initial_radius=3) for _ in range(count)))

        def run(network: nn.Module = network, x: Tensor = x) -> None:
            network(x).sum().backward()

        runs[str(count)] = run
    for count, ms in interleaved(runs, seconds).items():
        found[count] = {"ms": {"Auto": ms}, "mib": {"Auto": peak_memory(runs[count])}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=1.5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = {
        "width": {str(n): _against(make_case("dense", n, 0, 128, "middle"), arguments.seconds) for n in WIDTHS},
        "batch": {str(n): _against(make_case("dense", 256, 0, n, "middle"), arguments.seconds) for n in BATCHES},
        "steps": over_steps(),
        "layers": over_layers(arguments.seconds),
    }
    for name, rows in result.items():
        for size, row in rows.items():
            shown = {k: {m: round(v, 2) for m, v in row[k].items()} for k in ("ms", "mib") if k in row}
            print(f"{name} {size}: {shown}")
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
