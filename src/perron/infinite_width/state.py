"""The scalar state of an infinitely wide network: its variance, the shifts that centre it, and whether it is stable.

Source: Ling, Li, Feng, Zhang, Zhou, Qiu, Liao, "Deep equilibrium models are almost equivalent to not-so-deep explicit models
for high-dimensional Gaussian mixtures", ICML 2024 (arXiv 2402.02697), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.moments import Moments, gaussian_moments

__all__ = ["EquilibriumState", "UnstableError", "solve_state"]

# Of the iteration for tau^2.
_STEPS, _LARGEST, _TOL = 10_000, 1e12, 1e-15


class UnstableError(ValueError):
    """The infinitely wide equilibrium network has no stable fixed point; the message says by how much."""


@dataclass(frozen=True, kw_only=True)
class EquilibriumState:
    """z = phi(sqrt(sa) A z + sqrt(sb) B x)/sqrt(m), m -> infinity, phi = phi0 - shift.

    Attributes:
        phi: the function phi0.
        sa, sb, tau0: variances of A and B, and the root mean square norm of the inputs.
        tau2: the variance of what phi is given.
        moments: of phi at tau.
        h1, h4: sb/(1 - sa E[phi']^2) and sb/(1 - sa (1/2) E(phi^2)'').
    """

    phi: ScalarFunction
    sa: Tensor
    sb: Tensor
    tau0: Tensor
    tau2: Tensor
    moments: Moments

    @property
    def shift(self) -> Tensor:
        return self.moments.mean

    @property
    def stability(self) -> Tensor:
        """sa E phi'^2, below 1 where a random network converges."""
        return self.sa * self.moments.energy

    @property
    def h1(self) -> Tensor:
        return self.sb / (1 - self.sa * self.moments.slope**2)

    @property
    def h4(self) -> Tensor:
        return self.sb / (1 - self.sa * self.moments.spread)


def solve_state(
    activation: str | ScalarFunction, sa: float | Tensor, sb: float | Tensor, tau0: float | Tensor
) -> EquilibriumState:
    """tau^2 = sa Var phi0(tau xi) + sb tau0^2, from below; differentiable with respect to sa, sb and tau0.

    Args:
        activation: a name or a `ScalarFunction`.
        sa, sb: variances, sa >= 0 and sb > 0.
        tau0: root of the mean squared norm of the inputs, positive.

    Raises:
        ValueError: a number is out of range.
        UnstableError: no finite tau, or sa E phi'(tau xi)^2 >= 1, where random networks do not converge.

    >>> state = solve_state("relu", 0.3, 0.7, 1.0)
    >>> round(float(state.tau2), 10)
    0.7797301502
    """
    phi = scalar_function(activation)
    a, b, t0 = (torch.as_tensor(t, dtype=torch.float64) for t in (sa, sb, tau0))
    if not (bool(a >= 0) and bool(b > 0) and bool(t0 > 0) and all(bool(t.isfinite()) for t in (a, b, t0))):
        raise ValueError(f"sa must be >= 0, sb and tau0 positive, all finite; got {float(a)}, {float(b)}, {float(t0)}")
    source = (b * t0**2).detach()
    tau2 = source
    for _ in range(_STEPS):
        new = a.detach() * gaussian_moments(phi, tau2).second + source
        done = bool((new - tau2).abs() <= _TOL * new)
        tau2 = new
        if done or not float(tau2) < _LARGEST:
            break
    else:
        done = False
    if not done:
        raise UnstableError(
            f"the variance of {phi.name} with sa={float(a):g} has no finite fixed point (reached {float(tau2):.3g}); "
            "lower sa"
        )
    moments = gaussian_moments(phi, tau2)
    stability = float(a.detach() * moments.energy)
    if not stability < 1:
        raise UnstableError(
            f"sa E phi'(tau xi)^2 = {stability:.4g} for {phi.name} with sa={float(a):g}: random equilibrium networks "
            "converge only below 1; lower sa"
        )
    if any(t.requires_grad for t in (a, b, t0)):
        # One differentiable step, divided by 1 - the derivative of the map: the implicit function theorem.
        new = a * gaussian_moments(phi, tau2).second + b * t0**2
        tau2 = tau2 + (new - new.detach()) / (1 - (a * moments.spread).detach())
        moments = gaussian_moments(phi, tau2)
    return EquilibriumState(phi=phi, sa=a, sb=b, tau0=t0, tau2=tau2, moments=moments)
