"""Enclosures around a candidate from anywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perron.cells import reading
from perron.cells.chain import Chain
from perron.cells.refusal import Refusal
from perron.cells.trace import trace
from perron.theory.base import Enclosure, Sign
from perron.theory.certify import derive
from perron.theory.enclosure import prove_around
from perron.theory.positive_concave import PositiveConcave

__all__ = ["check_injection", "enclose"]


def check_injection(injection: Tensor, sign: Sign) -> None:
    """Raise ValueError unless no entry contradicts this sign."""
    if sign is Sign.ANY:
        return
    bad = (injection <= 0) if sign is Sign.POSITIVE else (injection < 0)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = float(injection[tuple(where)])
        raise ValueError(
            f"injection must be {sign.value} for this cell, got {value:.6g} at index {where}; "
            "use injection='softplus' or 'relu' to make it so"
        )


@torch.no_grad()
def enclose(
    cell: nn.Module | Chain,
    candidate: Tensor,
    injection: Tensor,
    *,
    proof_dtype: torch.dtype = torch.float64,
    attempts: int = 12,
    neumann_steps: int = 60,
) -> Enclosure:
    """Prove an enclosure of the fixed point around a candidate, whatever produced it.

    Trial points are `candidate -/+ delta w`, w about `(I - J)^{-1} s` by Neumann steps, s a little over the residual.

    Args:
        cell: a positive concave cell (Sequential with one `Inject`), a layer with a `cell`, or a `Chain`.
        candidate: (batch, ...) any dtype, for instance float32 or bfloat16.
        injection: (batch, ...) b itself, as the cell adds it.
        proof_dtype: precision of the proof; float32 is refused where its sums cannot be bounded, and where a weight or the
            injection is float64: it would be rounded, and another cell be verified.
        attempts: how often delta is enlarged for samples that are not proven yet.
        neumann_steps: at most this many products with J.

    Returns:
        Enclosure, with `proven` false for samples where no enclosure was found (NaN candidates among them).

    Raises:
        Refusal: the cell has no certificate, its weights change at every read, or `proof_dtype` allows no proof.
        ValueError: shapes differ, or the injection is not positive where sigma(0) = 0.
    """
    if candidate.shape != injection.shape:
        raise ValueError(
            f"candidate has shape {tuple(candidate.shape)}, injection {tuple(injection.shape)}; they must agree"
        )
    with reading.without_autocast():
        if not isinstance(cell, Chain):
            reading.read_twice(cell)
        chain = cell if isinstance(cell, Chain) else trace(getattr(cell, "cell", cell))
        check_injection(injection, Sign.NONNEGATIVE)
        derived = derive(chain, (Sign.NONNEGATIVE, Sign.POSITIVE), (PositiveConcave(),))
        if not derived.certificate:
            raise Refusal(str(derived.certificate.refusal))
        check_injection(injection, derived.sign)
        given = {t.dtype for t in (injection, *chain.tensors)}
        if any(not t.is_floating_point or torch.promote_types(t, proof_dtype) != proof_dtype for t in given):
            raise Refusal(f"{proof_dtype} does not hold numbers of {', '.join(sorted(map(str, given)))}; use float64")
        rigorous = chain.to(proof_dtype).rigorous()
        if rigorous is None:
            raise Refusal(f"sums in {proof_dtype} cannot be bounded for this cell on {candidate.device}; use float64")
        candidate = candidate.to(proof_dtype).clamp_min(0)
        return prove_around(
            rigorous, injection.to(proof_dtype), candidate, attempts=attempts, neumann_steps=neumann_steps
        )
