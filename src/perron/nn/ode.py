"""Neural ODE blocks, as baselines of equilibrium layers: z(1) of dz/dt = f(z), z(0) = x. Needs perron[ode].

Sources: Chen et al., "Neural ordinary differential equations", NeurIPS 2018 (arXiv 1806.07366); Dupont et al., "Augmented
neural ODEs", NeurIPS 2019 (arXiv 1904.01681). The solver is torchdiffeq's Dormand-Prince with adaptive steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NeuralODE"]


class NeuralODE(nn.Module):
    """z(1) of dz/dt = W tanh(z) + b, started at the input, with zeros appended for the augmented variant.

    Args:
        features: of input and output.
        augment: dimensions appended to the state, and dropped at the end.
        rtol, atol: tolerances of the integrator.

    Shape:
        input and output (batch, features).

    Attributes:
        evaluations: of the right-hand side in the last forward pass.

    Raises:
        ImportError: torchdiffeq is missing.
        ValueError: `augment` is negative.
    """

    def __init__(self, features: int, *, augment: int = 0, rtol: float = 1e-3, atol: float = 1e-3) -> None:
        super().__init__()
        if augment < 0:
            raise ValueError(f"augment must not be negative, got {augment}")
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("neural ODEs need torchdiffeq: pip install perron[ode]") from error
        self._integrate: Any = odeint
        self.augment, self.rtol, self.atol = augment, rtol, atol
        self.inner = nn.Linear(features + augment, features + augment)
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations = 0

        def velocity(_: Tensor, z: Tensor) -> Tensor:
            self.evaluations += 1
            return self.inner(torch.tanh(z))

        times = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        end = self._integrate(velocity, F.pad(x, (0, self.augment)), times, rtol=self.rtol, atol=self.atol)[-1]
        return end[:, : x.shape[1]]

    def extra_repr(self) -> str:
        return f"augment={self.augment}, rtol={self.rtol}, atol={self.atol}"
