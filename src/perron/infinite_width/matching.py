"""The shallow explicit network with the kernel of an equilibrium network: its activations from four equations.

Source: Ling et al., ICML 2024 (arXiv 2402.02697), section 4. Closed forms where there are any (a hard tanh for functions
with E phi'' = 0, two leaky ReLUs for functions that are linear on both sides of 0), least squares from many starts
elsewhere.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction, clip_abs, hard_tanh, transformed, two_slopes
from perron.infinite_width.coefficients import (
    KernelCoefficients,
    ck_coefficients,
    explicit_coefficients,
    ntk_coefficients,
)
from perron.infinite_width.kernels import Trained
from perron.infinite_width.state import EquilibriumState, solve_state

__all__ = ["Family", "Match", "MatchWarning", "match_explicit"]

Family = Literal["auto", "hard_tanh", "leaky_relu", "clip_abs", "same"]

# Residuals above this are told; below this a search is over; starts of the least squares.
_SMALL, _SOLVED, _STARTS, _EVALUATIONS, _POLISH = 1e-6, 1e-11, 40, 100, 12


class MatchWarning(UserWarning):
    """The explicit network does not solve all four equations; the message has the numbers."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """An explicit network, and how well its kernel fits.

    Attributes:
        activations: phi_1, ..., phi_L, each to be centred where it is used.
        state: of the equilibrium network.
        target: "ck" or "ntk".
        wanted, found: (4,) a1, a2, a3 and diagonal, of the equilibrium network and of the explicit one.
        residuals: (4,) their differences, relative to a1 for the first three and to the diagonal.
    """

    activations: tuple[ScalarFunction, ...]
    state: EquilibriumState
    target: str
    wanted: Tensor
    found: Tensor

    @property
    def residuals(self) -> Tensor:
        return (self.found - self.wanted) / _scales(self.wanted)


def _scales(wanted: Tensor) -> Tensor:
    return torch.stack([wanted[0], wanted[0], wanted[0], wanted[3]])


def match_explicit(
    activation: str | ScalarFunction,
    sa: float,
    sb: float,
    tau0: float = 1.0,
    *,
    depth: int | None = None,
    family: Family = "auto",
    target: Literal["ck", "ntk"] = "ck",
    trained: Trained = "Av",
    train_input: bool | None = None,
) -> Match:
    """The activations of an explicit network whose kernel is that of an equilibrium network, for mixtures in high dimension.

    Args:
        activation, sa, sb, tau0: of the equilibrium network; see `perron.infinite_width.solve_state`.
        depth: layers; None for what the family needs.
        family: "hard_tanh" (one layer, for phi with E phi'' = 0), "leaky_relu" (two slopes), "clip_abs" (a clipped line and
            an absolute value), "same" (phi itself, scaled and shifted) or "auto".
        target: the conjugate or the tangent kernel.
        trained: for the tangent kernel, see `ImplicitKernels.ntk`.
        train_input: whether the explicit network's first layer is trained; None: as "auto" needs it, else yes.

    Raises:
        ValueError: an option is out of range.
        UnstableError: the equilibrium network has no stable state.

    Warns:
        MatchWarning: a residual is above 1e-6.

    >>> match = match_explicit("tanh", 0.3, 0.7)
    >>> match.activations
    (hard_tanh(0.745938083, 1.20691334),)
    """
    if target not in ("ck", "ntk") or family not in ("auto", "hard_tanh", "leaky_relu", "clip_abs", "same"):
        raise ValueError(f"target must be 'ck' or 'ntk' and family one of its names, got {target!r} and {family!r}")
    if depth is not None and depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    state = solve_state(activation, sa, sb, tau0)
    wanted = ck_coefficients(state) if target == "ck" else ntk_coefficients(state, trained)
    if family == "auto":
        odd = float(state.moments.curvature**2) < 1e-20 * float(state.moments.energy)
        family = "hard_tanh" if odd else "leaky_relu" if state.phi.slopes is not None else "same"
        if family == "leaky_relu" and target == "ntk" and trained == "Av":
            # No leaky ReLUs do; these do where the first layer is frozen.
            family, train_input = "clip_abs", bool(train_input)
    frozen = target == "ntk" and train_input is False
    depth = depth or (1 if family == "hard_tanh" else 2 if target == "ck" else 3)
    problem = _Problem(state, target, wanted, frozen)
    layers = _closed_form(problem, family, depth) or _search(problem, family, depth)
    match = Match(
        activations=tuple(layers), state=state, target=target, wanted=wanted.as_tensor(), found=problem.found(layers)
    )
    if not bool((match.residuals.abs() <= _SMALL).all()):
        numbers = ", ".join(f"{float(r):.2g}" for r in match.residuals)
        warnings.warn(
            f"{depth} layers of {family} do not reproduce the {target} of {state.phi.name} (sa={float(state.sa):g}): relative "
            f"residuals of a1, a2, a3 and the diagonal {numbers}; try another depth or family",
            MatchWarning,
            stacklevel=2,
        )
    return match


@dataclass(frozen=True)
class _Problem:
    """The four equations."""

    state: EquilibriumState
    target: str
    wanted: KernelCoefficients
    frozen: bool

    def found(self, layers: Sequence[ScalarFunction]) -> Tensor:
        both = explicit_coefficients(layers, self.state.tau0, train_input=not self.frozen)
        return both[0 if self.target == "ck" else 1].as_tensor()

    def residuals(self, layers: Sequence[ScalarFunction]) -> Tensor:
        wanted = self.wanted.as_tensor()
        return (self.found(layers) - wanted) / _scales(wanted)


# --------------------------------------------------------------------------------------------------------- closed forms


def _closed_form(problem: _Problem, family: Family, depth: int) -> list[ScalarFunction] | None:
    if family == "hard_tanh" and depth == 1 and not problem.frozen:
        return _one_hard_tanh(problem)
    if family == "leaky_relu" and depth == 2 and problem.target == "ck":
        return _two_leaky_relus(problem.wanted)
    return None


def _one_hard_tanh(problem: _Problem) -> list[ScalarFunction] | None:
    """a clip(x, -c, c): the ratio of diagonal and a1 gives c, and a1 gives a."""
    wanted, tau0 = problem.wanted, float(problem.wanted.tau0)
    ratio = float(wanted.diagonal / wanted.a1) / (tau0**2 if problem.target == "ck" else 1.0)

    def excess(y: float) -> float:
        eps = math.erf(y / math.sqrt(2))
        top = eps + y * y * math.erfc(y / math.sqrt(2)) - math.sqrt(2 / math.pi) * y * math.exp(-y * y / 2)
        if problem.target == "ck":
            return top / eps**2 - ratio
        return (top * tau0**2 + eps * tau0**2) / (2 * eps**2) - ratio

    low, high = 1e-6, 40.0
    if not excess(low) * excess(high) <= 0:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(low) * excess(middle) > 0 else (low, middle)
    y = (low + high) / 2
    eps = math.erf(y / math.sqrt(2))
    share = float(wanted.a1) if problem.target == "ck" else float(wanted.a1) / 2
    return [hard_tanh(math.sqrt(share) / eps, y * tau0)]


def _two_leaky_relus(wanted: KernelCoefficients) -> list[ScalarFunction] | None:
    """The cubic equation of the theory; None where it has no root in its range."""
    tau0, a1 = float(wanted.tau0), float(wanted.a1)
    k = math.pi / 2 - 1
    second = 4 * tau0**2 * float(wanted.a2) / a1
    third = 2 * tau0**2 * float(wanted.a3) / a1
    # k u (2 + k u) (third - u) = second - third
    roots = np.roots([-k * k, k * k * third - 2 * k, 2 * k * third, third - second])
    real = sorted(float(r.real) for r in roots if abs(r.imag) < 1e-9 and -1e-12 <= r.real <= third + 1e-12)
    if not real:
        return None
    u = max(real[0], 0.0)
    v = (1 + k * u) * (third - u)
    if v < 0:
        return None
    s = a1**0.25
    widths = s * math.sqrt(2 * math.pi * u), s * math.sqrt(2 * math.pi * v)
    return [two_slopes(s + w / 2, s - w / 2) for w in widths]


# -------------------------------------------------------------------------------------------------------- least squares


def _builder(problem: _Problem, family: Family) -> tuple[int, Callable[[Any], list[ScalarFunction]]]:
    """How many numbers a layer takes, and the layers made of rows of them: floats, or tensors to be differentiated."""
    size, make = {
        "hard_tanh": (2, lambda v: hard_tanh(_positive(v[0]), _positive(v[1]))),
        "leaky_relu": (2, lambda v: two_slopes(v[0] + v[1], v[0] - v[1])),
        "clip_abs": (3, lambda v: clip_abs(v[0], _positive(v[2]), v[1])),
        "same": (3, lambda v: transformed(problem.state.phi, v[0], _positive(v[1]), v[2])),
    }[family]
    return size, lambda rows: [make(row) for row in rows]


def _positive(v: Any) -> Any:
    return v.clamp(-8, 8).exp() if isinstance(v, Tensor) else math.exp(min(max(v, -8), 8))


def _search(problem: _Problem, family: Family, depth: int) -> list[ScalarFunction]:
    """The best of several local searches; stops at the first that solves the equations."""
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ImportError("matching without a closed form needs scipy: pip install perron[kernels]") from error
    size, make = _builder(problem, family)
    generator = np.random.default_rng(0)
    # b1 of a deep network is about a1 times the layers that are trained.
    layers = 1 if problem.target == "ck" else depth + (0 if problem.frozen else 1)
    slope = (float(problem.wanted.a1) / layers) ** (0.5 / depth)
    center = np.tile(
        {"hard_tanh": [0.0, 0.5], "leaky_relu": [slope, 0.4], "clip_abs": [slope, 0.4, 0.5]}.get(
            family, [1.0, 0.0, 0.0]
        ),
        depth,
    )

    def residuals(x: Tensor) -> Tensor:
        return torch.nan_to_num(problem.residuals(make(x.view(depth, size))), nan=1e3, posinf=1e3, neginf=-1e3)

    def value(x: np.ndarray) -> np.ndarray:
        return residuals(torch.from_numpy(x)).numpy()

    def slopes(x: np.ndarray) -> np.ndarray:
        return torch.autograd.functional.jacobian(residuals, torch.from_numpy(x)).numpy()

    # E phi'^2 changes with the place of a kink, which automatic differentiation of a quadrature does not see.
    moving = family in ("hard_tanh", "clip_abs") or (family == "same" and problem.state.phi.kinks)
    jacobian = "3-point" if problem.target == "ntk" and moving else slopes
    best: tuple[float, tuple[float, ...]] | None = None
    for start in range(_STARTS):
        x0 = center + (0.3 if start < _STARTS // 2 else 1.0) * generator.standard_normal(depth * size)
        found = least_squares(
            lambda x: residuals(torch.from_numpy(x)).numpy(),
            x0,
            jacobian,
            xtol=1e-15,
            ftol=1e-15,
            max_nfev=_EVALUATIONS,
        )
        x, step = found.x, np.linalg.pinv(found.jac)
        # Near a solution the search stagnates some digits before rounding; chord steps do not.
        for _ in range(_POLISH if found.cost < 1e-8 else 0):
            x = x - step @ value(x)
        worst = min((float(np.abs(value(t)).max()), tuple(t)) for t in (x, found.x))
        if best is None or worst < best:
            best = worst
        if best[0] < _SOLVED:
            break
    assert best is not None
    return make(np.reshape(best[1], (depth, size)).tolist())
