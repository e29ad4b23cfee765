"""The linear equations at a fixed point, g = J^T g + v and w = J w + v, and a bound on the error of g.

They are fixed point problems themselves, so the loop of the accelerated methods solves them: generalised conjugate
residuals (mixing of a linear iteration is just that), on the aggregated residual where the cell has a rank-one model.

The bound (theory: J >= 0 and J falls as z grows). For any w > 0 with `J(lower) w <= kappa w`, kappa < 1, the exact
Jacobian J* satisfies the same, so J*^T is a contraction in the norm `||g||_w = sum_i w_i |g_i|` with factor kappa. With
J any matrix between J(upper) and J(lower), c any candidate and g = J^T c + v,

    ||g - g*||_w <= (kappa ||g - c||_w + sum_i s_i |c_i|)/(1 - kappa),   s = (J(lower) - J(upper)) w.

So the last product, in float64, both proves the candidate and improves on it. Monotone cells, whose J may be larger than 1,
have a bound of their own (`_MonotoneProof`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, amin, euclidean, per_sample
from perron._numerics.rounding import Number, gamma, unit_roundoff
from perron.cells.chain import Chain, ChainLinearization
from perron.cells.dense import DenseStep
from perron.cells.opaque import OneSystem
from perron.cells.step import AffineStep, Linearization, Map
from perron.problem import Structure
from perron.solution import AdjointSolution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import Solver, report_failure
from perron.solvers.iteration import Found, Method, Rule, iterate
from perron.solvers.mixing import TRUST, Mixing
from perron.solvers.splitting import linear_splitting_for
from perron.theory.contraction import sensitivity, underflow, variation
from perron.theory.monotone_operator import margin

__all__ = ["adjoint_in_steps", "solve_adjoint", "solve_tangent"]

_WINDOW = 5
# Power steps for the weights: at most so many; the first vector whose kappa is this close to what it can become serves.
_POWER_STEPS, _GOOD = 6, 0.7
# Widths up to which the linear equation of a cell whose Jacobian may have negative entries is solved by factorisation.
_DIRECT = 512
# Residuals below so many units of roundoff are not asked for.
_ROUNDING = 16


@dataclass(frozen=True)
class _Linear:
    """g -> J^T g + v, or w -> J w + v, as a map to iterate."""

    jacobian: Linearization
    v: Tensor
    transposed: bool

    def __call__(self, g: Tensor) -> Tensor:
        return (self.jacobian.rmatvec(g) if self.transposed else self.jacobian.matvec(g)) + self.v

    def select(self, index: Tensor) -> _Linear:
        assert isinstance(self.jacobian, ChainLinearization)
        return replace(self, jacobian=self.jacobian.select(index), v=self.v[index])


class _Mixed:
    """Mixing of the adjoint's residuals, corrected by the rank-one model where there is one."""

    products, trust = 0, TRUST

    def __init__(self, model: Aggregation | None, slope: Tensor | None, mixing: Mixing) -> None:
        self.model, self.slope, self.mixing = model, slope, mixing

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        residual = fz - z
        if self.model is None or self.slope is None:
            return self.mixing(z, residual)
        return self.mixing(z, self.model.correct_adjoint(self.slope, residual))

    def select(self, index: Tensor) -> _Mixed:
        slope = None if self.slope is None else self.slope[index]
        return _Mixed(self.model, slope, self.mixing.select(index))


def _norm(weights: Tensor, t: Tensor) -> Tensor:
    """(batch,) sum_i w_i |t_i|."""
    return torch.linalg.vecdot(weights.flatten(1), t.flatten(1).abs())


@torch.no_grad()
def solve_tangent(map: Map, z: Tensor, injection: Tensor, v: Tensor, solver: Solver, structure: Structure) -> Tensor:
    """w = (I - J)^{-1} v at z, (batch, ...), to the solver's tolerance on the relative residual."""
    jacobian = _linearized(map, z, injection, structure)
    problem = _Linear(jacobian, v, False)
    rule = Rule(tol=solver.tol, slack=None, ahead=False, limit=solver.max_steps)
    found = _iterate(problem, None, None, rule, structure)
    converged = found.measure <= solver.tol
    _report("tangent", map, converged, found.measure, solver)
    return found.value


@torch.no_grad()
def solve_adjoint(
    map: Map,
    z: Tensor,
    injection: Tensor,
    v: Tensor,
    solver: Solver,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    structure: Structure,
) -> tuple[Tensor, AdjointSolution]:
    """Solve g = J(z)^T g + v, and bound the error of g where bounds of the fixed point are given.

    Args:
        map: the cell.
        z: (batch, ...) the fixed point.
        injection: (batch, ...) b.
        v: (batch, ...) the incoming gradient.
        solver: its tol (relative), max_steps and on_failure.
        bounds: proven lower and upper bounds of the fixed point.
        structure: what is proven of the cell.

    Returns:
        (g, AdjointSolution).
    """
    if not v.numel():
        none = v.new_zeros(len(v))
        return v, AdjointSolution(
            steps=none.long(), residual=none, error_bound=none, converged=none == 0, bounded=False
        )
    g, solution, measure = adjoint_in_steps(
        map, z, injection, v, solver.tol, solver.max_steps, bounds=bounds, structure=structure
    )
    _report("adjoint", map, solution.converged, measure, solver)
    return g, solution


def _report(what: str, map: Map, converged: Tensor, measure: Tensor, solver: Solver) -> None:
    unit = "batches" if isinstance(map, OneSystem) else "samples"
    report_failure(what, converged, measure, solver.tol, solver.max_steps, solver.on_failure, unit=unit)


@torch.no_grad()
def adjoint_in_steps(
    map: Map,
    z: Tensor,
    injection: Tensor,
    v: Tensor,
    tol: float,
    steps: int,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    structure: Structure,
    fixed: bool = False,
) -> tuple[Tensor, AdjointSolution, Tensor]:
    """`solve_adjoint` in at most, or if `fixed` exactly, so many products; also returns the measure of convergence.

    With `fixed` nothing waits for the device.
    """
    jacobian = _linearized(map, z, injection, structure)
    problem = _Linear(jacobian, v, True)
    model, slope = None, None
    if structure == "concave" and isinstance(map, Chain) and isinstance(jacobian, ChainLinearization):
        model = Aggregation.of(map, z)
        slope = None if model is None else jacobian.slope
    if bounds is None or structure == "unknown" or not isinstance(map, Chain):
        found = _iterate(
            problem, model, slope, Rule(tol=tol, slack=None, ahead=False, limit=steps, fixed=fixed), structure
        )
        unknown = torch.full_like(found.measure, math.inf)
        solution = AdjointSolution(
            steps=found.steps,
            residual=found.measure,
            error_bound=unknown,
            converged=found.measure <= tol,
            bounded=False,
        )
        return found.value, solution, found.measure
    proof = (_Proof if structure == "concave" else _SignedProof)(map, injection, bounds, model, fixed)
    contracts = proof.kappa < 1
    if structure == "contracting" and not bool(contracts.all()) and (least := margin(map)) > 0:
        return _solve_monotone(problem, _MonotoneProof(map, injection, bounds, least), z, tol, steps)
    room = torch.where(contracts, 1 - proof.kappa.clamp_max(0.999), 1.0).to(v.dtype)
    # Where no kappa was found the plain sum of entries serves to stop.
    weights = torch.where(per_sample(contracts, v), proof.weights.to(v.dtype), 1.0)
    rule = Rule(tol=0.5 * tol * room, slack=None, ahead=True, limit=max(steps - 1, 1), fixed=fixed, weights=weights)
    found = _iterate(problem, model, slope, rule, structure)
    g, residual, bound = proof.finish(z, found.candidate, v)
    measure = residual / room
    return (
        g,
        AdjointSolution(
            steps=found.steps + 1, residual=residual, error_bound=bound, converged=measure <= tol, bounded=True
        ),
        measure,
    )


def _solve_monotone(
    problem: _Linear, proof: _MonotoneProof, z: Tensor, tol: float, steps: int
) -> tuple[Tensor, AdjointSolution, Tensor]:
    assert isinstance(problem.jacobian, ChainLinearization)
    g, taken = _direct(problem, problem.jacobian), torch.zeros(len(z), dtype=torch.long, device=z.device)
    if g is None:
        # The bound is so many times the residual; what rounding keeps these steps from is not asked of them.
        goal = max(0.25 * tol / proof.amplification, _ROUNDING * unit_roundoff(z.dtype))
        rule = Rule(tol=goal, slack=None, ahead=False, limit=max(steps - 1, 1), patient=True)
        found = _iterate(problem, None, None, rule, "contracting")
        g, taken = found.value, found.steps
    residual, bound = proof.judge(z, g, problem.v)
    return (
        g,
        AdjointSolution(steps=taken + 1, residual=residual, error_bound=bound, converged=residual <= tol, bounded=True),
        residual,
    )


def _linearized(map: Map, z: Tensor, injection: Tensor, structure: Structure) -> Linearization:
    """J at the fixed point z, from its value alone where the cell allows it: on the orthant."""
    found = map.linearize_at_fixed_point(z) if structure == "concave" and isinstance(map, Chain) else None
    return map.linearize(z, injection) if found is None else found


def _iterate(
    problem: _Linear, model: Aggregation | None, slope: Tensor | None, rule: Rule, structure: Structure
) -> Found:
    jacobian = problem.jacobian
    # An operator known only through automatic differentiation acts on the whole batch.
    rule = replace(rule, compact=isinstance(jacobian, ChainLinearization))
    method: Method = _Mixed(model, slope, Mixing(_WINDOW, linear=True))
    start = problem.v
    if structure == "contracting" and isinstance(jacobian, ChainLinearization):
        direct = _direct(problem, jacobian)
        if direct is not None:
            start = direct
        else:
            # Where J may be larger than 1 its powers do not converge.
            method = linear_splitting_for(jacobian, problem.v, transposed=problem.transposed) or method
    return iterate(problem, method, start, rule)


def _direct(problem: _Linear, jacobian: ChainLinearization) -> Tensor | None:
    """The solution itself where J = D W is small enough to factorise for every sample, else None."""
    v = problem.v
    affine = [s for s in jacobian.steps if isinstance(s, AffineStep)]
    slopes = [d for d in jacobian.diagonals if d is not None]
    # Some sigma may come before W; only the order D W is dealt with here.
    if v.dim() != 2 or v.shape[1] > _DIRECT or len(affine) != 1 or len(slopes) != 1:
        return None
    if not isinstance(jacobian.steps[0], DenseStep):
        return None
    system = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - slopes[0].unsqueeze(2) * jacobian.steps[0].weight
    found, _ = torch.linalg.solve_ex(system.mT if problem.transposed else system, v.unsqueeze(2))
    return torch.where(per_sample(all_finite(found.squeeze(2)), v), found.squeeze(2), v)


def weighted_error(kappa: Number, residual: Number, spread: Number) -> Number:
    """At least ||g - g*||, from ||g - g*|| <= kappa ||c - g*|| + spread and ||c - g*|| <= residual + ||g - g*||, kappa < 1."""
    return (kappa * residual + spread) / (1 - kappa)


def amplification(norm: Number, m: Number) -> Number:
    """|g* - c| / |r| at most, for m |y|^2 <= <r, y> and |g* - c| <= norm |y| + |r|, m > 0; see `_MonotoneProof`."""
    return 1 + norm / m


class _Proof:
    """The weighted norm in which J*^T contracts, and the error bound in it, rounding included.

    Attributes:
        exact: the chain in float64.
        weights: w; kappa: (batch,) with |J*| w <= kappa w; spread: at least |J - J*| w.
        underflow: (batch,) what it adds at most to the weighted norm of J^T c, and to the other norms.
        exact_rounding: of the last product and the norms, relative to what is summed.
    """

    structure: Structure = "concave"

    def __init__(
        self,
        chain: Chain,
        injection: Tensor,
        bounds: tuple[Tensor, Tensor],
        model: Aggregation | None,
        fixed: bool = False,
    ) -> None:
        self.exact = chain.to(torch.float64)
        self.injection = injection
        count = sum(s.terms + 4 for s in chain.affine) + 4 * len(chain.steps)
        lower, upper = bounds
        # The weights need three digits; a float32 product gives them if its sums are rigorous.
        rigorous = chain.rigorous()
        start = lower if rigorous is not None else lower.double()
        # Slopes come from the value here if they do in `finish`: an enclosure of z* is wider than that of f(z*).
        by_value = (chain if rigorous is not None else self.exact).linearize_at_fixed_point(start, "upper")
        if by_value is None:
            start = lower.double()
            steep = self.exact.linearize_steps(start, injection.double(), "upper")
        else:
            steep = by_value if rigorous is None else replace(by_value, steps=rigorous.steps)
            if model is not None:
                # The Perron vector of D r c^T.
                start = steep.slope * model.rows.view_as(lower[:1])
        self.rounding = 4 * gamma(count, start.dtype)
        weights, image, kappa = _weights(steep, start, self.rounding, fixed)
        self.weights, self.kappa = weights.double(), kappa.double()
        slope = None if by_value is None else steep.slope.double()
        # A w is at hand where J = D A.
        stages = _stages(steep, weights) if slope is None else [weights, image / steep.slope, image]
        self.underflow = _underflow(stages, count)
        self.spread = self._spread(lower.double(), upper.double(), image.double(), slope)
        self.exact_rounding = 4 * gamma(count, torch.float64)

    def _spread(self, lower: Tensor, upper: Tensor, image: Tensor, slope: Tensor | None) -> Tensor:
        """At least (J(lower) - J(upper)) w, given J(lower) w, and the slopes in it where these come from the value."""
        image = image * (1 + self.rounding)
        if slope is not None:
            # J = D A: the difference of the diagonals is exact enough, and needs no product.
            steep = self.exact.linearize_at_fixed_point(lower, "upper")
            flat = self.exact.linearize_at_fixed_point(upper, "lower")
            assert steep is not None
            assert flat is not None
            share = (steep.slope - flat.slope) / slope.clamp_min(torch.finfo(image.dtype).tiny)
            return image * share * (1 + 1e-12)
        flat = self.exact.linearize_steps(upper, self.injection.double(), "lower")
        return (image - flat.matvec(self.weights) * (1 - self.rounding)).clamp_min(0)

    def finish(self, z: Tensor, candidate: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g, the candidate improved by one product; (batch,) its residual, and the bound on ||g - g*||_w / ||g||_w."""
        c, exact_v, w = candidate.double(), v.double(), self.weights
        exact = _linearized(self.exact, z.double(), self.injection.double(), self.structure).rmatvec(c) + exact_v
        g = exact.to(v.dtype)
        norm, residual = _norm(w, g.double()), _norm(w, exact - c)
        entries = g[0].numel()
        spread = torch.linalg.vecdot(self.spread.flatten(1), c.flatten(1).abs())
        # Underflow is absolute; the rest is relative to what was summed.
        noise = self.exact_rounding * (_norm(w, c) + _norm(w, exact) + _norm(w, exact_v)) + self.underflow
        rounded = _norm(w, exact - g.double()) + self.underflow
        bound = (weighted_error(self.kappa, residual, spread + noise) + rounded) / norm
        # The last factor is for the norms themselves.
        bound = bound * (1 + self.exact_rounding + 8 * entries * unit_roundoff(c.dtype))
        # The adjoint of nothing is nothing; a norm of 0 alone may be that of products below the range.
        nothing = (amax(c.abs()) == 0) & (amax(exact_v.abs()) == 0)
        bound = torch.where(nothing, 0.0, bound)
        proven = (self.kappa < 1) & all_finite(g) & torch.isfinite(bound)
        relative = torch.where(norm > 0, residual / norm, residual)
        return g, relative.to(v.dtype), torch.where(proven, bound, math.inf)


class _SignedProof(_Proof):
    """The same for cells that contract: |J| is bounded over the whole enclosure, and so is its variation in it."""

    structure: Structure = "contracting"

    def __init__(
        self,
        chain: Chain,
        injection: Tensor,
        bounds: tuple[Tensor, Tensor],
        model: Aggregation | None,
        fixed: bool = False,
    ) -> None:
        self.exact, self.injection = chain.to(torch.float64), injection
        count = sum(s.terms + 4 for s in chain.affine) + 4 * len(chain.steps)
        self.rounding = self.exact_rounding = 4 * gamma(count, torch.float64)
        lower, upper = (t.double() for t in bounds)
        steep, smallest, _ = sensitivity(self.exact, injection.double(), lower, upper)
        self.weights, _, self.kappa = _weights(steep, torch.ones_like(lower), self.rounding, fixed)
        self.spread = variation(steep, smallest, self.weights) * (1 + self.rounding)
        self.underflow = _underflow(_stages(steep, self.weights), count)


class _MonotoneProof:
    """A bound for cells sigma(W z + b) with I - W strongly monotone, however large J is; in the Euclidean norm.

    With the residual r = W^T D* c + v - c at the exact slopes D*, e = g* - c solves e = W^T D* e + r. For y = D* e that
    says m |y|^2 <= <(I - W^T) y, y> + <(1/D* - 1) y, y> = <r, y>, hence |e| <= (1 + |W|/m) |r|.
    """

    def __init__(self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], least: float) -> None:
        rigorous = chain.to(torch.float64).rigorous()
        assert rigorous is not None
        self.exact, self.injection = rigorous, injection.double()
        lower, upper = (t.double() for t in bounds)
        steep, smallest, _ = sensitivity(rigorous, self.injection, lower, upper)
        assert smallest[-1] is not None
        self.steepest, self.flattest = steep.slope, smallest[-1]
        step = rigorous.steps[0]
        assert isinstance(step, AffineStep)
        self.step, self.norm = step, step.norm()
        self.underflow = lower[:1].numel() * step.underflow(torch.float64) + 1e-290
        self.amplification = amplification(self.norm, least) * (1 + 1e-12)

    def judge(self, z: Tensor, candidate: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(batch,) the relative residual of a candidate, and the bound on |candidate - g*| / |candidate|."""
        c, v = candidate.double(), v.double()
        slope = self.exact.linearize_steps(z.double(), self.injection).slope
        summed = self.step.magnitude().transpose(slope * c.abs(), c.shape) + v.abs() + c.abs()
        r = self.step.transpose(slope * c, c.shape) + v - c
        # Any slope will do: what it is away from the exact one is bounded over the whole enclosure.
        away = torch.maximum(self.steepest - slope, slope - self.flattest).clamp_min(0) * c.abs()
        rounding = 2 * gamma(self.step.terms + 8, c.dtype)
        size, norms = euclidean(c), 1 + gamma(c[:1].numel() + 16, c.dtype)
        total = euclidean(r) + rounding * euclidean(summed) + self.norm * euclidean(away) + self.underflow
        bound = self.amplification * total / size * norms**2
        relative = torch.where(size > 0, euclidean(r) / size, euclidean(r))
        bound = torch.where((size == 0) & (euclidean(v) == 0), 0.0, bound)
        return relative.to(candidate.dtype), torch.where(all_finite(c) & bound.isfinite(), bound, math.inf)


def _stages(steep: ChainLinearization, w: Tensor) -> list[Tensor]:
    """w, and what each step of J makes of it."""
    stages = [w]
    for step, diagonal in zip(steep.steps, steep.diagonals, strict=True):
        if isinstance(step, AffineStep):
            stages.append(step.linear(stages[-1]))
        elif diagonal is not None:
            stages.append(diagonal * stages[-1])
    return stages


def _underflow(stages: list[Tensor], count: int) -> Tensor:
    """(batch,) what underflow adds to ||J^T c||_w: an error e below the range at some step counts <e, that step's w>."""
    total = torch.stack([stage.flatten(1).double().sum(1) for stage in stages]).sum(0)
    entries = max(stage[:1].numel() for stage in stages)
    return 8 * (count + entries) * torch.finfo(torch.float64).tiny * (1 + total)


def _weights(steep: ChainLinearization, start: Tensor, rounding: float, fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w > 0, J w and (batch,) kappa with J w <= kappa w, by power iteration (Collatz-Wielandt).

    The weights are scaled to a largest entry of 1 per sample.
    """
    w = _scaled(start)
    best, image = w, w
    lost = underflow(steep, w)
    kappa = torch.full((len(w),), math.inf, dtype=w.dtype, device=w.device)
    for k in range(2 if fixed else _POWER_STEPS):
        jw = steep.matvec(w)
        ratio = jw / w
        top = amax(ratio) * (1 + rounding) + 2 * lost / amin(w)
        better = top < kappa
        mask = per_sample(better, w)
        best, image = torch.where(mask, w, best), torch.where(mask, jw, image)
        kappa = torch.where(better, top, kappa)
        # The spectral radius is about the mean of J w / w, weighted by w.
        radius = jw.flatten(1).sum(1) / w.flatten(1).sum(1)
        if not fixed and (k + 1 == _POWER_STEPS or not bool((1 - kappa < _GOOD * (1 - radius)).any())):
            break
        w = _scaled(jw + 0.05 * w)
    return best, image, kappa


def _scaled(w: Tensor) -> Tensor:
    w = w / per_sample(amax(w), w).clamp_min(torch.finfo(w.dtype).tiny)
    return w.clamp_min(math.sqrt(torch.finfo(w.dtype).tiny))
