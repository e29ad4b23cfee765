"""Anderson acceleration of Picard's iteration, per sample, safeguarded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solvers.accelerated import Accelerated
from perron.solvers.aggregation import Aggregation, Mixed
from perron.solvers.iteration import Method
from perron.solvers.mixing import Mixing
from perron.theory.base import Origin

__all__ = ["Anderson"]


@dataclass(frozen=True, kw_only=True)
class Anderson(Accelerated):
    """Anderson acceleration (Anderson 1965; Walker & Ni 2011), regularised and safeguarded per sample.

    Where a mixed point has a residual ten times that of the best one before it, or is not a number, the next point is half
    of the way there from the last accepted one.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps, step_dtype: as in every solver.
        window: earlier steps that are mixed.
        damping: the mixing parameter beta, in (0, 1]: z + beta (f(z) - z), less what the window explains of it.

    Raises:
        ValueError: an option is out of range.

    >>> from perron.nn import PositiveConcaveLinear
    >>> layer = PositiveConcaveLinear(4, 8, solver=Anderson(window=3))
    >>> layer.solve(torch.randn(16, 4)).certified
    True
    """

    window: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method, Tensor]:
        mixing = Mixing(self.window, self.damping)
        if origin is None:
            return Mixed(None, mixing), torch.zeros_like(problem.injection)
        return Mixed(None, mixing), mixing(origin.p, origin.at_p.to(origin.p.dtype) - origin.p)
