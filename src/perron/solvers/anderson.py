"""Anderson acceleration of Picard's iteration, per sample, safeguarded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.solvers.accelerated import Accelerated, Origin
from perron.solvers.base import FixedPointProblem
from perron.solvers.iteration import Method
from perron.solvers.mixing import Mixed, Mixing

__all__ = ["Anderson"]


@dataclass(frozen=True)
class Anderson(Accelerated):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011), regularised and safeguarded per sample.

    Where a mixed point has a larger residual than the best one before it, the next point is Picard's from that one.

    Args:
        tol, max_steps, stop, verify, on_failure, steps, precision: as in every solver.
        window: earlier steps that are mixed.

    Raises:
        ValueError: an option is out of range.

    >>> from perron.nn import PositiveConcaveLinear
    >>> layer = PositiveConcaveLinear(4, 8, solver=Anderson(window=3))
    >>> layer.solve(torch.randn(16, 4)).certified
    True
    """

    window: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def method(self, problem: FixedPointProblem, origin: Origin | None) -> tuple[Method, Tensor]:
        mixing = Mixing(self.window)
        if origin is None:
            return Mixed(None, mixing), torch.zeros_like(problem.injection)
        return Mixed(None, mixing), mixing(origin.p, origin.at_p.to(origin.p.dtype) - origin.p)
