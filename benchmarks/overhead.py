"""Where a layer's time goes: tensor operations, products, transfers to the host, and milliseconds, forward and backward.

Random dense maps of spectral radius about 1 with injections c softplus(randn, beta=5), one thread. It uses nothing but
the layer, so an older version can be profiled with it: PYTHONPATH=<checkout>/src python benchmarks/overhead.py

    python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perron.nn import Activate, Equilibrium, Inject

CASES = ((80, 64, 0.15), (256, 128, 0.15), (256, 128, 0.019), (1024, 128, 0.15))
PRODUCTS = {"mm", "addmm", "bmm"}
WAITS = {"_local_scalar_dense", "nonzero"}


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.found["operations"] += 1
        if name in PRODUCTS:
            self.found[f"products {args[0].dtype}"] += 1
        self.found["waits"] += name in WAITS
        return func(*args, **(kwargs or {}))


def _median(run: Callable[[], Any], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    for width, batch, c in CASES:
        weight = torch.rand(width, width)
        linear = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            linear.weight.copy_(weight / weight.sum() * width)
        layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("tanh")))
        layer.solver = type(layer.solver)(max_steps=400)
        b = (c * nn.functional.softplus(torch.randn(batch, width), beta=5)).requires_grad_()

        def both(layer: Equilibrium = layer, b: torch.Tensor = b) -> None:
            layer.zero_grad()
            b.grad = None
            layer(b).sum().backward()

        with _Count() as count:
            both()
        solution = layer.last_solution
        assert solution is not None
        assert solution.adjoint is not None
        print(
            f"width {width}, batch {batch}, c {c}: {_median(both, 20 if width < 1000 else 5):.1f} ms, {dict(count.found)}, "
            f"{solution.steps.double().mean():.1f} evaluations, {solution.adjoint.steps.double().mean():.1f} adjoint products"
        )


if __name__ == "__main__":
    main()
