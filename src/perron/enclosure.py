"""Two-sided bounds on the fixed point of a positive concave cell, proven by two evaluations of f.

If `p >= 0` and `f(p) >= p` then `p <= z*`; if `f(q) <= q` then `z* <= q`. Both are checked with the rounding error of f
on the unfavourable side. The two evaluations give more: f is concave, so on the segment from p to q

    f((1-t) p + t q) >= (1-t) f(p) + t f(q),

and the point `y = (1-t) p + t q` is itself below z* as long as `t (q - f(q)) <= (1-t) (f(p) - p)`. The largest such t
usually moves the lower bound most of the way to the upper one, at no further evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perron._batch import all_finite, all_true, amax, amin, per_sample
from perron.certificates import derive
from perron.cells import Chain, Refusal, Rounding, trace, unit_roundoff

__all__ = ["Enclosure", "chord", "prove", "prove_around", "relative_error_bound", "round_outward", "verify"]


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
    evaluations: int = 2


def chord(gain: Tensor, loss: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """Largest t with `t loss <= (1 - t) gain` per sample, reshaped to broadcast; entries with `loss <= noise` do not bind.

    Args:
        gain: (batch, ...) f(p) - p.
        loss: (batch, ...) q - f(q).
        noise: losses up to this are treated as zero; a proof must leave it at 0.
    """
    binding = loss > noise
    ratio = torch.where(binding, gain / torch.where(binding, loss, 1.0), torch.inf)
    s = amin(ratio).clamp_min(0)
    return per_sample(torch.where(s.isinf(), 1.0, s / (1 + s)), gain)


def prove(chain: Chain, injection: Tensor, p: Tensor, q: Tensor, rounding: Rounding | None = None) -> Enclosure:
    """Prove an enclosure from a lower and an upper trial point, in the dtype of the arguments.

    The certificate of the chain (existence and uniqueness) is the caller's business; so is `injection`'s sign.

    Args:
        chain: the cell, in the dtype of the proof.
        injection: (batch, ...) b.
        p, q: (batch, ...) trial points, 0 <= p <= q; entries of q may be inf only if the sample is not to be proven.
        rounding: of the chain in this dtype, if already known.
    """
    dtype = injection.dtype
    u = unit_roundoff(dtype)
    rounding = rounding or chain.rounding(dtype)
    n = len(p)
    values = chain(torch.cat([p, q]), torch.cat([injection, injection]))
    # The factors 1 -/+ 8u cover the roundings of these lines themselves.
    low = (values * (1 - rounding.relative) * (1 - 8 * u) - 2 * rounding.absolute).clamp_min(0)
    high = values * (1 + rounding.relative) * (1 + 8 * u) + 2 * rounding.absolute
    proven = all_true((p >= 0) & (p <= low[:n]) & (high[n:] <= q) & torch.isfinite(q) & (p <= q))
    t = chord((low[:n] - p).clamp_min(0), (q - low[n:]).clamp_min(0)) * (1 - 1e-3)
    lower = torch.maximum(low[:n], ((1 - t) * low[:n] + t * low[n:]) * (1 - 8 * u))
    upper = torch.minimum(high[n:], q)
    residual = amax((values[n:] - q).abs() / values[n:].clamp_min(torch.finfo(dtype).tiny))
    return Enclosure(lower, upper, proven, dtype, residual)


def relative_error_bound(value: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(batch,) bound on max_i |value - z*|_i / z*_i from lower <= z* <= upper, rounded up; 0/0 counts 0."""
    value = value.to(lower.dtype)
    gap = torch.maximum(upper - value, value - lower)
    ratio = torch.where(gap <= 0, 0.0, gap / lower)
    bound = amax(ratio) * (1 + 8 * unit_roundoff(lower.dtype))
    return torch.where(bound.isnan(), torch.inf, bound)


def round_outward(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tightest bounds in `dtype` around [lower, upper]."""
    if dtype == lower.dtype:
        return lower, upper
    low, high = lower.to(dtype), upper.to(dtype)
    low = torch.where(low.to(lower.dtype) > lower, torch.nextafter(low, torch.zeros_like(low)), low)
    high = torch.where(high.to(upper.dtype) < upper, torch.nextafter(high, torch.full_like(high, torch.inf)), high)
    return low, high


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
        raise ValueError(f"candidate has shape {tuple(candidate.shape)}, injection {tuple(injection.shape)}; they must agree")
    with torch.autocast(candidate.device.type, enabled=False):
        certificate = derive(chain, positive_injection=False)
        if not certificate:
            certificate = derive(chain, positive_injection=True)
            check_injection(injection, positive=True)
        check_injection(injection, positive=False)
        if not certificate:
            raise Refusal(str(certificate.refusal))
        reason = chain.trustworthy_in(dtype, candidate.device)
        if reason is not None:
            raise Refusal(reason)
        candidate = candidate.to(dtype).clamp_min(0)
        return prove_around(
            chain.to(dtype), injection.to(dtype), candidate, attempts=attempts, neumann_steps=neumann_steps
        )


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
        attempt = prove(chain, injection, (z - step).clamp_min(0), z + step, rounding)
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
