"""The n x n kernels of infinitely wide networks, equilibrium and explicit: conjugate kernels and neural tangent kernels.

With S the Gram matrix of the inputs and H = sa G + sb S, the conjugate kernel G of z = phi(sqrt(sa) A z + sqrt(sb) B x)
/sqrt(m) is the fixed point of G_ij = E phi(u_i) phi(u_j), u ~ N(0, H). Its equation falls apart: an entry depends on
itself and on two entries of the diagonal, whose own equations are scalar. So rows are the samples of a fixed point
problem, and a few n x n matrices are all the memory there is need of.

Source: Ling et al., ICML 2024 (arXiv 2402.02697), for trained A and read-out ("Av"). With B trained, too ("ABv"), the
tangent kernel is (G + sb D o S)/(1 - sa D).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perron.cells.opaque import Opaque
from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.dual import Dual
from perron.infinite_width.moments import gaussian_moments
from perron.infinite_width.state import EquilibriumState, UnstableError, solve_state
from perron.solvers import Auto, FixedPointProblem

__all__ = [
    "ImplicitKernels",
    "Trained",
    "check_inputs",
    "explicit_ck",
    "explicit_kernels",
    "explicit_ntk",
    "implicit_ck",
    "implicit_kernels",
    "implicit_ntk",
]

Trained = Literal["Av", "ABv"]

# Entries that are worked on at a time.
_BLOCK = 2**21
_TOL, _STEPS = 1e-12, 2000


@dataclass(frozen=True, kw_only=True)
class ImplicitKernels:
    """The kernels of an equilibrium network on a data set, and how they were found.

    Attributes:
        ck: (n, n) G.
        slopes: (n, n) D_ij = E phi'(u_i) phi'(u_j).
        gram: (n, n) S.
        state: the scalar state at tau0, the root mean squared norm of the inputs.
        steps: evaluations of the slowest row.
        residual: the largest relative residual of a row.
        truncation: bound on the error of an entry by the expansion of the dual activation; 0 for closed forms.
    """

    ck: Tensor
    slopes: Tensor
    gram: Tensor
    state: EquilibriumState
    steps: int
    residual: float
    truncation: float

    def ntk(self, trained: Trained = "Av") -> Tensor:
        """(n, n) the tangent kernel with A and the read-out trained, or B as well.

        Raises:
            ValueError: trained is neither.
        """
        if trained not in ("Av", "ABv"):
            raise ValueError(f"trained must be 'Av' or 'ABv', got {trained!r}")
        top = self.ck if trained == "Av" else self.ck + self.state.sb * self.slopes * self.gram
        return top / (1 - self.state.sa * self.slopes)


class _Rows(nn.Module):
    """H -> sa E phi(u_i) phi(u_j) on rows of H; sb S comes as the injection.

    The last column carries the number of the row, so that rows may leave the batch: (number + 1/2)/n.
    """

    def __init__(self, dual: Dual, sa: Tensor) -> None:
        super().__init__()
        self.dual, self.sa, self.count = dual, sa, len(dual.variance)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        rows = (x[:, -1] * self.count - 0.5).round().long()
        h = self.sa * self.dual(rows, z[:, :-1])
        return torch.cat([h, torch.zeros_like(x[:, -1:])], 1) + x


def check_inputs(x: Tensor) -> Tensor:
    """float64; refuses what is not a finite (samples, features) matrix without zero rows."""
    if x.dim() != 2 or not x.is_floating_point() or not x.numel():
        raise ValueError(f"X must be (samples, features), floating point and not empty, got {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("X has NaN or infinite entries")
    zero = (x == 0).all(1).nonzero().flatten()
    if len(zero):
        raise ValueError(f"row {int(zero[0])} of X is zero: its correlations are not defined; leave it out")
    return x.double()


def _blocks(count: int, device: torch.device) -> Iterator[Tensor]:
    size = max(1, _BLOCK // count)
    for start in range(0, count, size):
        yield torch.arange(start, min(start + size, count), device=device)


def _correlation(gram: Tensor) -> float:
    """The largest absolute correlation of two different inputs."""
    scale = gram.detach().diagonal().rsqrt()
    largest = 0.0
    for rows in _blocks(len(gram), gram.device):
        block = (gram.detach()[rows] * scale[rows, None] * scale).abs()
        block[torch.arange(len(rows), device=gram.device), rows] = 0
        largest = max(largest, float(block.max()))
    return largest


def _diagonal(state: EquilibriumState, source: Tensor) -> Tensor:
    """(n,) q = sa E phi(sqrt(q) xi)^2 + source, differentiable."""

    def step(q: Tensor) -> Tensor:
        return state.sa * gaussian_moments(state.phi, q, shift=state.shift.expand_as(q)).second + source

    with torch.no_grad():
        q = source
        for _ in range(_STEPS):
            q, old = step(q), q
            if bool(((q - old).abs() <= 1e-15 * q).all()) or not bool((q < 1e12).all()):
                break
    if not bool((q < 1e12).all()):
        worst = int(q.argmax())
        raise UnstableError(
            f"the variance of sample {worst} has no finite fixed point; lower sa, or normalise the rows"
        )
    q = q.detach()
    if not _differentiable(state, source):
        return q
    slope = state.sa.detach() * gaussian_moments(state.phi, q, shift=state.shift.detach().expand_as(q)).spread
    new = step(q)
    return q + (new - new.detach()) / (1 - slope)


def _differentiable(state: EquilibriumState, source: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (state.sa, state.sb, state.tau0, source))


def implicit_kernels(
    X: Tensor, activation: str | ScalarFunction, sa: float | Tensor, sb: float | Tensor
) -> ImplicitKernels:
    """Conjugate and tangent kernels of an infinitely wide equilibrium network with centred Gaussian weights.

    Differentiable with respect to sa, sb and X (once).

    Args:
        X: (n, p) inputs; center them and give their rows unit norm, as the theory of the equivalent network asks.
        activation: a name as in `perron.infinite_width.scalar_function`, or a `ScalarFunction`; centred at tau.
        sa, sb: variances of A and B.

    Raises:
        ValueError: X is not a finite matrix without zero rows, or a variance is out of range.
        UnstableError: sa is too large for random networks to converge.

    Warns:
        UserWarning: the expansion of the dual activation leaves more than 1e-6.
    """
    x = check_inputs(X)
    gram = x @ x.t()
    state = solve_state(activation, sa, sb, gram.diagonal().mean().sqrt())
    q = _diagonal(state, state.sb * gram.diagonal())
    # Those of the fixed point are hardly larger; the bound below is of what they turn out to be.
    correlation = _correlation(gram)
    dual = Dual(state.phi, q, state.shift, correlation)
    solver = Auto(tol=_TOL, max_steps=_STEPS, proof_dtype=None)
    steps, residual, ck, slopes = 0, 0.0, torch.empty_like(gram), torch.empty_like(gram)
    frozen = Dual(state.phi, q.detach(), state.shift.detach(), correlation) if q.requires_grad else dual
    cell = _Rows(frozen, state.sa.detach())
    count = len(x)
    for rows in _blocks(count, x.device):
        source = state.sb * gram[rows]
        number = ((rows + 0.5) / count).unsqueeze(1)
        problem = FixedPointProblem(
            map=Opaque.of(cell, independent=True), injection=torch.cat([source.detach(), number], 1)
        )
        with torch.no_grad():
            solution = solver.solve(problem)
        h = solution.value[:, :-1]
        steps, residual = max(steps, int(solution.steps.max())), max(residual, float(solution.residual.max()))
        if _differentiable(state, source):
            new = state.sa * dual(rows, h) + source
            h = h + (new - new.detach()) / (1 - (state.sa * dual.of_slope(rows, h)).detach())
        own = torch.nn.functional.one_hot(rows, count).bool()
        found = h.detach().abs() / (q.detach()[rows, None] * q.detach()).sqrt()
        correlation = max(correlation, float(found.masked_fill(own, 0.0).max()))
        ck[rows] = torch.where(own, dual.second, dual(rows, h))
        slopes[rows] = torch.where(own, dual.energy, dual.of_slope(rows, h))
    truncation = dual.warn_of_truncation(correlation)
    return ImplicitKernels(
        ck=ck, slopes=slopes, gram=gram, state=state, steps=steps, residual=residual, truncation=truncation
    )


def implicit_ck(X: Tensor, activation: str | ScalarFunction, sa: float | Tensor, sb: float | Tensor) -> Tensor:
    """(n, n) conjugate kernel; see `implicit_kernels`.

    >>> X = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64))
    >>> bool(torch.allclose(implicit_ck(X, "linear", 0.3, 0.7), 0.7 * X @ X.t() / (1 - 0.3)))
    True
    """
    return implicit_kernels(X, activation, sa, sb).ck


def implicit_ntk(
    X: Tensor,
    activation: str | ScalarFunction,
    sa: float | Tensor,
    sb: float | Tensor,
    *,
    trained: Trained = "Av",
) -> Tensor:
    """(n, n) neural tangent kernel; see `implicit_kernels` and `ImplicitKernels.ntk`."""
    return implicit_kernels(X, activation, sa, sb).ntk(trained)


def explicit_kernels(
    X: Tensor, activations: Sequence[str | ScalarFunction], *, train_input: bool = True
) -> tuple[Tensor, Tensor]:
    """(n, n) conjugate and tangent kernel of z_l = phi_l(W_l z_{l-1})/sqrt(m), every phi_l centred at tau_{l-1}.

    Args:
        X: (n, p) inputs z_0.
        activations: phi_1, ..., phi_L; names or `ScalarFunction`s.
        train_input: whether the first layer's weights are trained.

    Raises:
        ValueError: X is not a finite matrix without zero rows, no activation, or an unknown one.
    """
    x = check_inputs(X)
    if not activations:
        raise ValueError("an explicit network needs at least one activation")
    g = x @ x.t()
    tangent = g if train_input else torch.zeros_like(g)
    tau2 = g.diagonal().mean()
    for given in activations:
        phi = scalar_function(given)
        q, moments = g.diagonal(), gaussian_moments(phi, tau2)
        dual = Dual(phi, q, moments.mean, _correlation(g))
        values, slopes = torch.empty_like(g), torch.empty_like(g)
        for rows in _blocks(len(x), x.device):
            own = torch.nn.functional.one_hot(rows, len(x)).bool()
            values[rows] = torch.where(own, dual.second, dual(rows, g[rows]))
            slopes[rows] = torch.where(own, dual.energy, dual.of_slope(rows, g[rows]))
        g = values
        tangent = g + slopes * tangent
        tau2 = moments.second
    return g, tangent


def explicit_ck(X: Tensor, activations: Sequence[str | ScalarFunction]) -> Tensor:
    """(n, n) conjugate kernel; see `explicit_kernels`."""
    return explicit_kernels(X, activations)[0]


def explicit_ntk(X: Tensor, activations: Sequence[str | ScalarFunction], *, train_input: bool = True) -> Tensor:
    """(n, n) neural tangent kernel; see `explicit_kernels`."""
    return explicit_kernels(X, activations, train_input=train_input)[1]
