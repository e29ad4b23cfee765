"""Networks of finite width: the random equilibrium network, and the explicit one that stands for it.

Their features have the kernels of this package in the limit: `features @ features.T` approaches the conjugate kernel like
one over the root of the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.matching import Family, Match, match_explicit
from perron.infinite_width.moments import gaussian_moments
from perron.infinite_width.state import solve_state
from perron.nn import Equilibrium
from perron.solvers import Solver

__all__ = ["ExplicitEquivalent", "GaussianEquilibrium", "explicit_equivalent"]


class _GaussianCell(nn.Module):
    """phi(sqrt(sa) A z + b)/sqrt(m)."""

    def __init__(self, width: int, phi: ScalarFunction, sa: float, shift: float) -> None:
        super().__init__()
        self.phi, self.sa, self.shift = phi, sa, shift
        self.A = nn.Parameter(torch.empty(width, width))

    def forward(self, z: Tensor, b: Tensor) -> Tensor:
        return (self.phi(math.sqrt(self.sa) * z @ self.A.t() + b) - self.shift) / math.sqrt(len(self.A))


class GaussianEquilibrium(Equilibrium):
    """z = phi(sqrt(sa) A z + sqrt(sb) B x)/sqrt(m), A and B standard normal, phi centred at tau.

    A random network of this kind converges for widths that are not small, as the state's stability says; nothing is
    certified of it.

    Args:
        in_features: p.
        width: m.
        activation: see `perron.infinite_width.scalar_function`.
        sa, sb: variances of A and B.
        tau0: root mean squared norm of the inputs.
        solver: default `Auto()`.
        generator: draws A and B.

    Shape:
        input (batch, in_features), output (batch, width).

    Raises:
        ValueError: a number is out of range.
        UnstableError: sa is too large for random networks to converge.

    >>> GaussianEquilibrium(8, 64)(torch.nn.functional.normalize(torch.randn(3, 8))).shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        activation: str | ScalarFunction = "tanh",
        *,
        sa: float = 0.3,
        sb: float = 0.7,
        tau0: float = 1.0,
        solver: Solver | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if in_features < 1 or width < 1:
            raise ValueError(f"in_features and width must be at least 1, got {in_features} and {width}")
        state = solve_state(activation, sa, sb, tau0)
        super().__init__(_GaussianCell(width, state.phi, sa, float(state.shift)), injection="free", solver=solver)
        self.in_features, self.width, self.sa, self.sb, self.tau0 = in_features, width, sa, sb, tau0
        self.B = nn.Parameter(torch.empty(width, in_features))
        self.reset_parameters(generator)

    @property
    def activation(self) -> ScalarFunction:
        return self.cell.phi  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw A and B anew."""
        for weight in (self.cell.A, self.B):
            weight.normal_(generator=generator)  # type: ignore[operator]

    def _pre_injection(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"the input must be (batch, {self.in_features}), got {tuple(x.shape)}")
        return math.sqrt(self.sb) * (x.to(self.B.dtype) @ self.B.t())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.width}, {self.activation}, sa={self.sa}, sb={self.sb}, solver={self.solver}"


class ExplicitEquivalent(nn.Module):
    """z_l = phi_l(W_l z_{l-1})/sqrt(m), every phi_l centred: features for a linear read-out, in place of an equilibrium.

    Args:
        in_features: p.
        width: m, of every layer.
        activations: phi_1, ..., phi_L, from `match_explicit`.
        tau0: root mean squared norm of the inputs.
        input_weight: (width, in_features) W_1, for instance B of the equilibrium network; None to draw it.
        generator: draws the weights, standard normal.

    Shape:
        input (batch, in_features), output (batch, width).

    Raises:
        ValueError: a number is out of range, no activation, or a weight of another shape.

    >>> net = ExplicitEquivalent(8, 64, match_explicit("tanh", 0.3, 0.7).activations)
    >>> net(torch.nn.functional.normalize(torch.randn(3, 8))).shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        activations: Sequence[str | ScalarFunction],
        tau0: float = 1.0,
        *,
        input_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or width < 1 or not activations or not 0 < tau0 < math.inf:
            raise ValueError(
                "in_features, width, tau0 must be positive and there must be an activation, got "
                f"{in_features}, {width}, {tau0}, {list(activations)}"
            )
        if input_weight is not None and input_weight.shape != (width, in_features):
            raise ValueError(f"input_weight must be ({width}, {in_features}), got {tuple(input_weight.shape)}")
        self.in_features, self.width, self.tau0 = in_features, width, tau0
        self.activations = tuple(scalar_function(a) for a in activations)
        self.shifts: list[float] = []
        self.weights = nn.ParameterList()
        tau2 = torch.tensor(tau0**2, dtype=torch.float64)
        for number, phi in enumerate(self.activations):
            shape = (width, in_features if number == 0 else width)
            given = input_weight if number == 0 else None
            weight = torch.empty(shape).normal_(generator=generator) if given is None else given.detach().clone()
            self.weights.append(nn.Parameter(weight))
            moments = gaussian_moments(phi, tau2)
            self.shifts.append(float(moments.mean))
            tau2 = moments.second

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"the input must be (batch, {self.in_features}), got {tuple(x.shape)}")
        z = x
        for phi, shift, weight in zip(self.activations, self.shifts, self.weights, strict=True):
            z = (phi(z @ weight.t()) - shift) / math.sqrt(self.width)
        return z

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.width}, {list(self.activations)}, tau0={self.tau0:g}"


def explicit_equivalent(
    layer: nn.Module,
    data: Tensor,
    *,
    width: int | None = None,
    family: Family = "auto",
    share_input: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[ExplicitEquivalent, Match]:
    """The explicit network with the conjugate kernel of a random equilibrium network, for this kind of data.

    Args:
        layer: a `GaussianEquilibrium`.
        data: (n, p) inputs; only their mean squared norm counts. Center them and normalise their rows.
        width: of the explicit network; None for the layer's.
        family: see `match_explicit`.
        share_input: whether the first layer takes over B, if the width allows it.
        generator: draws the other weights.

    Returns:
        (network, match): the match has the residuals of the four equations.

    Raises:
        ValueError: the layer is of another kind: the theory asks for centred Gaussian weights, and nonnegative ones, for
            instance, are not centred; or the data do not fit.

    Warns:
        MatchWarning: a residual is not small.
    """
    if not isinstance(layer, GaussianEquilibrium):
        raise ValueError(
            f"only a GaussianEquilibrium has an explicit equivalent, and this is a {type(layer).__name__}: the theory asks for "
            "centred Gaussian weights (nonnegative weights, for instance, act through one scalar per sample instead)"
        )
    if data.dim() != 2 or data.shape[1] != layer.in_features or not len(data):
        raise ValueError(f"data must be (n, {layer.in_features}) and not empty, got {tuple(data.shape)}")
    tau0 = float(data.detach().double().square().sum(1).mean().sqrt())
    match = match_explicit(layer.activation, layer.sa, layer.sb, tau0, family=family)
    width = width or layer.width
    shared = layer.B.detach() if share_input and width == layer.width else None
    net = ExplicitEquivalent(
        layer.in_features, width, match.activations, tau0, input_weight=shared, generator=generator
    )
    return net.to(layer.B), match
