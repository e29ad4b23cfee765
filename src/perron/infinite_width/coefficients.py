"""The few numbers on which these kernels depend for high-dimensional Gaussian mixtures, and the kernels made of them.

G is about a1 S + V C V^T + (diag - a1 tau0^2) I, with V = [J/sqrt(p), psi] and C = [[a2 t t^T + a3 T, a2 t], [a2 t^T, a2]]:
J says which class a sample is of, t and T hold traces of the classes' covariances, psi the fluctuation of norms.

Source: Ling et al., ICML 2024 (arXiv 2402.02697), theorems 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.kernels import Trained
from perron.infinite_width.moments import gaussian_moments, hermite_coefficients
from perron.infinite_width.state import EquilibriumState

__all__ = ["KernelCoefficients", "ck_coefficients", "explicit_coefficients", "ntk_coefficients"]


@dataclass(frozen=True, kw_only=True)
class KernelCoefficients:
    """Of the Gram matrix, of the two structured terms, and the diagonal.

    Attributes:
        a1, a2, a3: coefficients.
        diagonal: what the entries of the diagonal are about.
        tau0: root mean squared norm of the inputs.
        diagonal_slope: derivative of an entry of the diagonal with respect to the squared norm of its input.
        gram_slope: derivative of a1 with respect to the squared norm of one of both inputs. Both slopes are known of
            equilibrium networks only; the norms' fluctuations make the largest error where they are left out.
    """

    a1: Tensor
    a2: Tensor
    a3: Tensor
    diagonal: Tensor
    tau0: Tensor
    diagonal_slope: Tensor | None = None
    gram_slope: Tensor | None = None

    def as_tensor(self) -> Tensor:
        """(4,) a1, a2, a3 and the diagonal."""
        return torch.stack([self.a1, self.a2, self.a3, self.diagonal])


def ck_coefficients(state: EquilibriumState) -> KernelCoefficients:
    """Of the conjugate kernel of an equilibrium network."""
    m, kept = state.moments, 1 - state.sa * state.moments.slope**2
    g2 = m.curvature**2
    return KernelCoefficients(
        a1=m.slope**2 * state.h1,
        a2=g2 * state.h4**2 / (4 * kept),
        a3=g2 * state.h1**2 / (2 * kept),
        diagonal=m.second,
        tau0=state.tau0,
        diagonal_slope=m.spread * state.h4,
        gram_slope=state.sb / kept**2 * _slope_of_g1(state),
    )


def _slope_of_g1(state: EquilibriumState) -> Tensor:
    """How the product of E phi' of two inputs changes with the squared norm of one: half E phi' times E of the third."""
    third = hermite_coefficients(state.phi, state.tau2, 4)[..., 3] * math.sqrt(6) / state.tau2**1.5
    return state.moments.slope * third * state.h4 / 2


def _slope_of_energy(state: EquilibriumState) -> Tensor:
    """How E phi'^2 changes with the squared norm of the input."""
    phi = state.phi
    square = replace(phi, value=lambda x: phi.slope(x) ** 2, slope=torch.zeros_like)
    return gaussian_moments(square, state.tau2).curvature / 2 * state.h4


def ntk_coefficients(state: EquilibriumState, trained: Trained = "Av") -> KernelCoefficients:
    """Of its tangent kernel.

    Raises:
        ValueError: trained is neither "Av" nor "ABv".
    """
    if trained not in ("Av", "ABv"):
        raise ValueError(f"trained must be 'Av' or 'ABv', got {trained!r}")
    ck, m, sa = ck_coefficients(state), state.moments, state.sa
    g1, g2 = m.slope**2, m.curvature**2
    of_input = state.sb if trained == "ABv" else torch.zeros_like(state.sb)
    kept = 1 - sa * g1
    b1 = (ck.a1 + of_input * g1) / kept
    b3 = (ck.a3 + of_input * g2 * state.h1 + b1 * sa * g2 * state.h1) / kept
    diagonal = (m.second + of_input * m.energy * state.tau0**2) / (1 - sa * m.energy)
    energy_slope = _slope_of_energy(state)
    diagonal_slope = (
        m.spread * state.h4 + of_input * (m.energy + energy_slope * state.tau0**2) + diagonal * sa * energy_slope
    ) / (1 - sa * m.energy)
    # Of g1 h1/(1 - sa g1), and with the input's weights of g1 (h1 + sb)/(1 - sa g1).
    of_g1 = state.sb * (1 + sa * g1) if trained == "Av" else 2 * state.sb
    gram_slope = of_g1 / kept**3 * _slope_of_g1(state)
    return KernelCoefficients(
        a1=b1,
        a2=ck.a2 / kept,
        a3=b3,
        diagonal=diagonal,
        tau0=state.tau0,
        diagonal_slope=diagonal_slope,
        gram_slope=gram_slope,
    )


def explicit_coefficients(
    activations: Sequence[str | ScalarFunction], tau0: float | Tensor, *, train_input: bool = True
) -> tuple[KernelCoefficients, KernelCoefficients]:
    """Of the conjugate and of the tangent kernel of an explicit network.

    Args:
        activations: phi_1, ..., phi_L, each centred where it is used.
        tau0: root mean squared norm of the inputs.
        train_input: whether the first layer's weights are trained.
    """
    t0 = torch.as_tensor(tau0, dtype=torch.float64)
    one, zero = torch.ones_like(t0), torch.zeros_like(t0)
    a1, a2, a3, a4, tau2 = one, zero, zero, one, t0**2
    b1, b2, b3 = (one if train_input else zero), zero, zero
    kappa2 = tau2 if train_input else zero
    for given in activations:
        m = gaussian_moments(scalar_function(given), tau2)
        g1, g2 = m.slope**2, m.curvature**2
        old1 = a1
        a1, a2, a3, a4 = (
            g1 * a1,
            g1 * a2 + g2 * a4**2 / 4,
            g1 * a3 + g2 * a1**2 / 2,
            m.spread * a4,
        )
        b1, b2, b3 = a1 + g1 * b1, a2 + g1 * b2, a3 + g1 * b3 + g2 * old1 * b1
        tau2, kappa2 = m.second, m.second + m.energy * kappa2
    return KernelCoefficients(a1=a1, a2=a2, a3=a3, diagonal=tau2, tau0=t0), KernelCoefficients(
        a1=b1, a2=b2, a3=b3, diagonal=kappa2, tau0=t0
    )
