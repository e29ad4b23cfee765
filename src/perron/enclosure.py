"""Two-sided bounds on the fixed point of a positive concave cell, proven from a few evaluations of f.

If `p >= 0` and `f(p) >= p` then `p <= z*`; if `f(q) <= q` then `z* <= q`. Both are checked with the rounding error of f
on the unfavourable side. Concavity gives more from the same evaluations:

    f((1-a) p) >= (1-a) f(p) + a f(0)          a point that misses by rounding only is mended by a little scaling,
    f((1+a) q) <= (1+a) f(q) - a f(0)          downwards or upwards,
    f((1-t) p + t q) >= (1-t) f(p) + t f(q)    and the chord from p to q gives a far better lower bound: its point at t
                                               is below z* as long as t (q - f(q)) <= (1-t) (f(p) - p).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perron._batch import all_finite, all_true, amax, amin, per_sample
from perron.affine import Refusal
from perron.cells import Chain, trace
from perron.certificates import derive
from perron.rounding import Rounding, unit_roundoff

__all__ = [
    "Enclosure",
    "Evaluated",
    "chord",
    "observe",
    "prove",
    "prove_around",
    "relative_error_bound",
    "round_outward",
    "verify",
]


@dataclass(frozen=True)
class Enclosure:
    """`lower <= z* <= upper` for the samples where `proven` holds.

    Attributes:
        lower, upper: (batch, ...) in the precision of the proof.
        proven: (batch,) whether the bounds are proven.
        precision: dtype of the arithmetic.
        residual: (batch,) max_i |f(y) - y|_i / f(y)_i at the upper trial point.
        evaluations: of f or its Jacobian, per sample, that the proof took.
    """

    lower: Tensor
    upper: Tensor
    proven: Tensor
    precision: torch.dtype
    residual: Tensor
    evaluations: int = 0


def chord(gain: Tensor, loss: Tensor) -> Tensor:
    """Nearly the smallest w with `(1 - w) loss <= w gain` per sample, reshaped to broadcast: how far to stay from q.

    Entries with `loss = 0` do not bind. The result is 0.1 % on the safe side, which covers its own rounding; 1 - w is only
    that accurate where w is far above the unit roundoff.

    Args:
        gain: (batch, ...) f(p) - p, not negative.
        loss: (batch, ...) q - f(q), not negative.
    """
    # The smallest number there is makes 0/0 infinite (a selection by mask costs ten times as much). It is no risk: in
    # its presence f still gains by the final scaling of `prove`, see there.
    ratio = (gain + _smallest(gain.dtype)).div_(loss)
    s = (amin(ratio) * (1 - 1e-3)).clamp(0, 1e30)
    return per_sample(1 / (1 + s), gain)


def _smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).tiny * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Evaluated:
    """Computed values of f: at 0, at a lower trial point p and at an upper one q; (batch, ...) each."""

    at_zero: Tensor
    p: Tensor
    at_p: Tensor
    q: Tensor
    at_q: Tensor


def prove(values: Evaluated, rounding: Rounding) -> Enclosure:
    """Prove an enclosure from computed values of f, in their dtype, without evaluating f again.

    The certificate of the cell (existence and uniqueness) and the sign of its injection are the caller's business.
    """
    p, q = values.p, values.q
    u = unit_roundoff(p.dtype)
    # The factors 1 -/+ 8u here and 1.01 below cover the roundings of these very lines. In place where that saves memory.
    down, up = (1 - rounding.relative) * (1 - 8 * u), (1 + rounding.relative) * (1 + 8 * u)
    low_zero, low_p, low_q = (
        (f * down).sub_(2 * rounding.absolute).clamp_min_(0) for f in (values.at_zero, values.at_p, values.at_q)
    )
    high_q = (values.at_q * up).add_(2 * rounding.absolute)
    miss = p - low_p
    shrink = _needed_scaling(miss, low_zero)
    grow = _needed_scaling(high_q - q, low_zero)
    # Comparisons with NaN are false.
    ordered = (amin(p) >= 0) & (amin(q - p) >= 0) & (amax(q) < torch.inf) & (amax(values.at_q) < torch.inf)
    proven = ordered & (shrink < 0.5) & (grow < 1)
    shrink, grow = per_sample(shrink, p), per_sample(grow, p)
    gain = torch.addcmul(shrink * low_zero, shrink - 1, miss).clamp_min_(0)
    top = (1 + grow) * q
    w = chord(gain, (top - low_q).clamp_min_(0))
    first = torch.addcmul(gain, 1 - shrink, p)
    # The factor takes at least 16u f(0) off: more than the smallest number that `chord` may have added to a gain.
    lower = torch.maximum(first, torch.lerp(low_q, first, w)).mul_(1 - 16 * u)
    upper = torch.minimum(top, high_q.mul_(1 + grow)).mul_(1 + 16 * u)
    proven &= amin(lower) >= 0
    residual = amax((q / values.at_q.clamp_min(torch.finfo(p.dtype).tiny)).sub_(1).abs_())
    return Enclosure(lower, upper, proven, p.dtype, residual)


def observe(trial: Evaluated) -> Enclosure:
    """The bounds of `prove` taken at face value, rounding ignored: nothing is proven by them, whatever `proven` says."""
    z, s, high = trial.p, trial.at_p, torch.minimum(trial.at_q, trial.q)
    noise = 4 * unit_roundoff(z.dtype) * s
    w = chord((s - z).clamp_min(0), (trial.q - high - noise).clamp_min(0))
    lower = torch.lerp(high, s, w)
    residual = amax((trial.q - high) / high.clamp_min(torch.finfo(z.dtype).tiny))
    return Enclosure(lower, torch.maximum(high, lower), all_finite(high) & all_finite(lower), z.dtype, residual)


def _needed_scaling(miss: Tensor, at_zero: Tensor) -> Tensor:
    """(batch,) the smallest a with `miss <= a f(0)`, a little enlarged; inf or NaN where there is none."""
    return amax((miss / at_zero).clamp_min_(0)) * 1.01


def prove_points(chain: Chain, injection: Tensor, p: Tensor, q: Tensor, rounding: Rounding) -> Enclosure:
    """`prove` with the evaluations of f at 0, p and q."""
    n = len(p)
    three = chain.select(torch.arange(n, device=p.device).repeat(3)) if chain.per_sample else chain
    f = three(torch.cat([torch.zeros_like(p), p, q]), torch.cat([injection] * 3))
    return replace(prove(Evaluated(f[:n], p, f[n : 2 * n], q, f[2 * n :]), rounding), evaluations=3)


def relative_error_bound(value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(batch,) bound on max_i |value - z*|_i / z*_i from lower <= z* <= upper, rounded up; 0/0 counts 0."""
    value = value.to(lower.dtype)
    gap = torch.maximum(upper - value, value - lower)
    bound = amax(gap.div_(lower.clamp_min(torch.finfo(lower.dtype).tiny))) * (1 + 8 * unit_roundoff(lower.dtype))
    # Without a positive lower bound there is no relative one, unless nothing is between them. NaN compares false.
    return torch.where((amin(lower) > 0) & (bound >= 0) | (bound == 0), bound, torch.inf)


def round_outward(lower: Tensor, upper: Tensor, dtype: torch.dtype, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Bounds in `dtype` around [lower, upper], a few units in the last place wider; nonnegative ones unless `signed`."""
    if dtype == lower.dtype:
        return lower, upper
    # A step outwards beyond the rounding, relative and for tiny numbers absolute.
    slack, least = 4 * unit_roundoff(dtype), 2 * _smallest(dtype)
    if signed:
        return (lower - slack * lower.abs() - least).to(dtype), (upper + slack * upper.abs() + least).to(dtype)
    low = (lower * (1 - slack)).sub_(least).clamp_min_(0).to(dtype)
    return low, (upper * (1 + slack)).add_(least).to(dtype)


def check_injection(injection: Tensor, *, positive: bool) -> None:
    """Raise ValueError unless every finite entry is nonnegative (positive)."""
    bad = (injection <= 0) if positive else (injection < 0)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = float(injection[tuple(where)])
        raise ValueError(
            f"injection must be {'positive' if positive else 'nonnegative'} for this cell, got {value:.6g} at index {where}; "
            "use injection='softplus' or 'relu' to make it so"
        )


@torch.no_grad()
def verify(
    cell: nn.Module | Chain,
    candidate: Tensor,
    injection: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    attempts: int = 12,
    neumann_steps: int = 60,
) -> Enclosure:
    """Prove an enclosure of the fixed point around a candidate, whatever produced it.

    Trial points are `candidate -/+ delta w`, w about `(I - J)^{-1} s` by Neumann steps, s a little over the residual.

    Args:
        cell: a positive concave cell (Sequential with one `Inject`), a layer with a `cell`, or a `Chain`.
        candidate: (batch, ...) any dtype, for instance float32 or bfloat16.
        injection: (batch, ...) b itself, as the cell adds it.
        dtype: precision of the proof; float32 is refused where its sums cannot be bounded.
        attempts: how often delta is enlarged for samples that are not proven yet.
        neumann_steps: at most this many products with J.

    Returns:
        Enclosure, with `proven` false for samples where no enclosure was found (NaN candidates among them).

    Raises:
        Refusal: the cell has no certificate, or `dtype` allows no proof.
        ValueError: shapes differ, or the injection is not positive where sigma(0) = 0.
    """
    chain = cell if isinstance(cell, Chain) else trace(getattr(cell, "cell", cell))
    if candidate.shape != injection.shape:
        raise ValueError(
            f"candidate has shape {tuple(candidate.shape)}, injection {tuple(injection.shape)}; they must agree"
        )
    with torch.autocast(candidate.device.type, enabled=False):
        certificate = derive(chain, positive_injection=False)
        if not certificate:
            certificate = derive(chain, positive_injection=True)
            check_injection(injection, positive=True)
        check_injection(injection, positive=False)
        if not certificate:
            raise Refusal(str(certificate.refusal))
        plain = chain.to(dtype).plainly()
        if plain is None:
            raise Refusal(f"sums in {dtype} cannot be bounded for this cell on {candidate.device}; verify in float64")
        candidate = candidate.to(dtype).clamp_min(0)
        return prove_around(plain, injection.to(dtype), candidate, attempts=attempts, neumann_steps=neumann_steps)


def prove_around(
    chain: Chain, injection: Tensor, z: Tensor, *, attempts: int = 12, neumann_steps: int = 60
) -> Enclosure:
    """Prove an enclosure around a candidate z >= 0, all in the dtype of the proof; see `verify`."""
    rounding = chain.rounding(z.dtype)
    jacobian = chain.linearize(z, injection)
    fz = chain(z, injection)
    # A floor from the smallest slack that survives rounding, so that converged coordinates can be proven too.
    slack = (fz - z).abs() + 8 * rounding.relative * fz + 8 * rounding.absolute
    finite = all_finite(z) & all_finite(injection)
    w, evaluations = slack, 2
    for _ in range(neumann_steps):
        jw = jacobian.matvec(w)
        evaluations += 1
        if bool((all_true(w - jw >= 0.5 * slack) | ~finite).all()):
            break
        w = slack + jw
    delta = torch.full((len(z),), 1.25, dtype=z.dtype, device=z.device)
    best: Enclosure | None = None
    for _ in range(attempts):
        step = per_sample(delta, z) * w
        attempt = prove_points(chain, injection, (z - step).clamp_min(0), z + step, rounding)
        evaluations += attempt.evaluations
        best = attempt if best is None else _merge(best, attempt)
        if bool((best.proven | ~finite).all()):
            break
        delta = torch.where(best.proven, delta, 3 * delta)
    assert best is not None
    return replace(best, proven=best.proven & finite, evaluations=evaluations)


def _merge(old: Enclosure, new: Enclosure) -> Enclosure:
    keep = per_sample(old.proven, old.lower)
    return Enclosure(
        torch.where(keep, old.lower, new.lower),
        torch.where(keep, old.upper, new.upper),
        old.proven | new.proven,
        old.precision,
        torch.where(old.proven, old.residual, new.residual),
    )
