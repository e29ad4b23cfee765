"""Two-sided bounds on the fixed point of a positive concave cell, proven from a few evaluations of f.

f is nonnegative, nondecreasing and concave on the orthant, with exactly one fixed point z*, which the certificate of the
cell vouches for. Then f(x) >= x >= 0 implies x <= z*, and f(x) <= x implies z* <= x. From f(0), f(p) and f(q) with
0 <= p <= q more such points follow. All of it is entrywise; l is a lower bound of f(0), and s, a, t are numbers:

    f((1-s) p) >= (1-s) f(p) + s l          for 0 <= s <= 1, so (1-s) p lies below z* if (1-s) (p - f(p)) <= s l;
    f((1+a) q) <= (1+a) f(q) - a l          for a >= 0, so (1+a) q lies above z* if (1+a) (f(q) - q) <= a l:
                                            with f(q) - q <= m l and m < 1, if a >= m/(1-m); with m >= 1 for no a;
    f((1-t) x + t y) >= (1-t) f(x) + t f(y) for 0 <= t <= 1 and any x, y >= 0, so (1-t) x + t y lies below z* if
                                            t (y - f(y)) <= (1-t) (f(x) - x): the chord from x = (1-s) p to y = (1+a) q.

Where f is affine all three are equalities. What lies below z* stays there when it is scaled down, and what lies above
when it is scaled up (the first two lines without a miss), so that points may be rounded towards the safe side; and f of
such a point is a bound of z*, too, and the better one. The rounding of f is taken on the unfavourable side, as is that of
the inequalities: no scalar of a proof is formed from a difference of numbers that have lost their digits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, all_true, amax, amin, per_sample
from perron._numerics.rounding import Number, Rounding, unit_roundoff
from perron.cells.chain import Chain
from perron.cells.jacobian import Jacobian
from perron.cells.map import Linearization
from perron.theory.base import Enclosure

__all__ = [
    "Evaluated",
    "chord",
    "observe",
    "prove",
    "prove_around",
    "relative_error_bound",
    "round_outward",
]


# Entries of a state, and of the Jacobians of a batch, up to which the widths of a proof are found by elimination.
_FACTORISED, _FACTORISED_TOGETHER = 1024, 2**24


# The largest m for which the upper point is scaled: a = m/(1-m) is then 9.
_MOST_LACK = 0.9


def super_scaling(m: Number) -> Number:
    """The smallest a >= 0 with `(1 + a) m <= a`, for 0 <= m < 1."""
    return m / (1 - m)


def chord_weights(r: Number) -> tuple[Number, Number]:
    """1 - t and t for the largest t with `t <= (1 - t) r`, r >= 0."""
    return 1 / (1 + r), r / (1 + r)


def chord(gain: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """1 - t and t for nearly the largest t with `t loss <= (1 - t) gain`, per sample, reshaped to broadcast.

    With the ratio r, at most the least gain/loss, t = r/(1 + r) and 1 - t = 1/(1 + r) are each accurate to a few units of
    roundoff; neither is taken as the difference of the other from 1, which has no digits where it is near 0.

    Args:
        gain: (batch, ...) f(x) - x or less, with a relative error of at most 1000 units of roundoff.
        loss: (batch, ...) y - f(y) or more, likewise; entries with `loss <= 0` do not bind.
    """
    u, tiny = unit_roundoff(gain.dtype), torch.finfo(gain.dtype).tiny
    # What underflow may have added to a gain or taken from a loss is far below the smallest normal number.
    ratio = (gain - tiny).clamp_min_(0).div_(loss.clamp_min(0).add_(tiny))
    # A ratio below that number has not the digits either, and counts as none.
    r = per_sample((amin(ratio) * (1 - 2048 * u) - tiny).clamp(0, 1 / u**2), gain)
    return chord_weights(r)


@dataclass(frozen=True, kw_only=True)
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
    # The factors 1 -/+ 8u and twice the absolute error cover the roundings of these very lines. In place to save memory.
    down, up = (1 - rounding.relative) * (1 - 8 * u), (1 + rounding.relative) * (1 + 8 * u)
    low_zero, low_p, low_q = (
        (f * down).sub_(2 * rounding.absolute).clamp_min_(0) for f in (values.at_zero, values.at_p, values.at_q)
    )
    high_q = (values.at_q * up).add_(2 * rounding.absolute)
    miss = p - low_p
    # (1-s) m <= s holds for s = m already. The hundredth more leaves every entry a gain of at least s l/101, so that the
    # digits that its difference loses are few.
    shrink = _needed(miss, low_zero) * 1.01
    lack = _needed(high_q - q, low_zero)
    # Comparisons with NaN are false.
    ordered = (amin(p) >= 0) & (amin(q - p) >= 0) & (amax(q) < torch.inf) & (amax(values.at_q) < torch.inf)
    proven = ordered & (shrink <= 1) & (lack <= _MOST_LACK)
    # 1 - m loses a digit at most, for m up to that.
    grow = super_scaling(lack) * (1 + 32 * u)
    shrink, grow = per_sample(shrink, p), per_sample(grow, p)
    gain = torch.addcmul(shrink * low_zero, shrink - 1, miss).clamp_min_(0)
    top = (1 + grow) * (1 + 4 * u) * q
    stay, go = chord(gain, top - low_q)
    first = torch.addcmul(gain, 1 - shrink, p)
    # f((1-t) x + t y) >= (1-t) (x + gain) + t f(y), sums of nonnegative numbers; the error of gain is some 6u f(x).
    lower = torch.maximum(first, torch.addcmul(stay * first, go, low_q)).mul_(1 - 32 * u)
    # f((1+a) q) <= (1+a) f(q).
    upper = torch.minimum(top, high_q.mul_(1 + grow)).mul_(1 + 32 * u)
    proven &= amin(lower) >= 0
    residual = amax((q / values.at_q.clamp_min(torch.finfo(p.dtype).tiny)).sub_(1).abs_())
    return Enclosure(lower=lower, upper=upper, proven=proven, proof_dtype=p.dtype, residual=residual)


def observe(trial: Evaluated) -> Enclosure:
    """The bounds of `prove` taken at face value, rounding ignored: nothing is proven by them, whatever `proven` says."""
    z, s, high = trial.p, trial.at_p, torch.minimum(trial.at_q, trial.q)
    noise = 4 * unit_roundoff(z.dtype) * s
    stay, go = chord((s - z).clamp_min(0), trial.q - high - noise)
    lower = torch.addcmul(stay * s, go, high)
    residual = amax((trial.q - high) / high.clamp_min(torch.finfo(z.dtype).tiny))
    return Enclosure(
        lower=lower,
        upper=torch.maximum(high, lower),
        proven=all_finite(high) & all_finite(lower),
        proof_dtype=z.dtype,
        residual=residual,
    )


def _needed(miss: Tensor, low_zero: Tensor) -> Tensor:
    """(batch,) at least the smallest m >= 0 with `miss <= m low_zero`, hardly more; inf or NaN where there is none."""
    # The last term covers what underflow takes off; it is nothing beside the roundoff of 1.
    most = amax((miss / low_zero).clamp_min_(0))
    return most * (1 + 8 * unit_roundoff(miss.dtype)) + torch.finfo(miss.dtype).tiny


def prove_points(chain: Chain, injection: Tensor, p: Tensor, q: Tensor, rounding: Rounding) -> Enclosure:
    """`prove` with the evaluations of f at 0, p and q."""
    n = len(p)
    three = chain.select(torch.arange(n, device=p.device).repeat(3)) if chain.per_sample else chain
    f = three(torch.cat([torch.zeros_like(p), p, q]), torch.cat([injection] * 3))
    return replace(
        prove(Evaluated(at_zero=f[:n], p=p, at_p=f[n : 2 * n], q=q, at_q=f[2 * n :]), rounding), evaluations=3
    )


def relative_error_bound(value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(batch,) bound on max_i |value - z*|_i / z*_i from lower <= z* <= upper, rounded up; 0/0 counts 0."""
    value = value.to(lower.dtype)
    gap = torch.maximum(upper - value, value - lower)
    # z* >= lower; a difference of floating-point numbers and a quotient are each rounded once, subnormal ones included.
    share = (gap / lower).clamp_min(torch.finfo(lower.dtype).tiny)
    bound = amax(torch.where(gap > 0, share, gap)) * (1 + 8 * unit_roundoff(lower.dtype))
    # Without a positive lower bound there is no relative one, unless nothing is between them. NaN compares false.
    return torch.where((amin(lower) > 0) & (bound >= 0) | (bound == 0), bound, torch.inf)


def round_outward(lower: Tensor, upper: Tensor, dtype: torch.dtype, *, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Bounds in `dtype` around [lower, upper], a few units in the last place wider; nonnegative ones unless `signed`."""
    if dtype == lower.dtype:
        return lower, upper
    # A step outwards beyond the rounding, relative and for tiny numbers absolute.
    slack, least = 4 * unit_roundoff(dtype), 2 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    # What is beyond the range of `dtype` must not become an infinite lower bound, nor one of -inf above.
    most = torch.finfo(dtype).max
    if signed:
        low, high = lower - slack * lower.abs() - least, upper + slack * upper.abs() + least
        return low.clamp_max(most).to(dtype), high.clamp_min(-most).to(dtype)
    low = (lower * (1 - slack)).sub_(least).clamp_(0, most).to(dtype)
    return low, (upper * (1 + slack)).add_(least).to(dtype)


def prove_around(
    chain: Chain, injection: Tensor, z: Tensor, *, attempts: int = 12, neumann_steps: int = 60
) -> Enclosure:
    """Prove an enclosure around a candidate z >= 0, all in the dtype of the proof; see `perron.enclose`."""
    rounding = chain.rounding(z.dtype)
    jacobian = chain.linearize(z, injection)
    fz = chain(z, injection)
    # A floor from the smallest slack that survives rounding, so that converged coordinates can be proven too.
    slack = (fz - z).abs() + 8 * rounding.relative * fz + 8 * rounding.absolute
    finite = all_finite(z) & all_finite(injection)
    w, products = _widths(chain, jacobian, slack, finite, neumann_steps)
    evaluations = 2 + products
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


def _widths(
    chain: Chain, jacobian: Linearization, slack: Tensor, finite: Tensor, neumann_steps: int
) -> tuple[Tensor, int]:
    """About (I - J)^{-1} slack, and the products that it took; nothing rests on its accuracy."""
    w = _factorised(chain, jacobian, slack)
    if w is not None and bool((all_true(w >= 0.5 * slack) & all_finite(w) | ~finite).all()):
        return w, 0
    w, products = slack, 0
    for _ in range(neumann_steps):
        jw = jacobian.matvec(w)
        products += 1
        if bool((all_true(w - jw >= 0.5 * slack) | ~finite).all()):
            break
        w = slack + jw
    return w, products


def _factorised(chain: Chain, jacobian: Linearization, slack: Tensor) -> Tensor | None:
    """(I - J)^{-1} slack by elimination, where J = D A is small; scaled by the slack, however far its entries lie apart."""
    entries = slack[0].numel() if len(slack) else 0
    if not 0 < entries <= _FACTORISED or len(slack) * entries**2 > _FACTORISED_TOGETHER:
        return None
    if not isinstance(jacobian, Jacobian) or not chain.single or chain.per_sample:
        return None
    unit = torch.eye(entries, dtype=slack.dtype, device=slack.device)
    scale = slack.flatten(1)
    scaled = jacobian.slope.flatten(1).unsqueeze(2) * chain.matrix(slack) * (scale.unsqueeze(1) / scale.unsqueeze(2))
    y, _ = torch.linalg.solve_ex(unit - scaled, torch.ones_like(scale))
    return (y * scale).view_as(slack)


def _merge(old: Enclosure, new: Enclosure) -> Enclosure:
    keep = per_sample(old.proven, old.lower)
    return Enclosure(
        lower=torch.where(keep, old.lower, new.lower),
        upper=torch.where(keep, old.upper, new.upper),
        proven=old.proven | new.proven,
        proof_dtype=old.proof_dtype,
        residual=torch.where(old.proven, old.residual, new.residual),
    )
