"""What every solver returns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["AdjointSolution", "Solution"]


@dataclass(frozen=True, kw_only=True)
class AdjointSolution:
    """How the adjoint equation g = J^T g + v was solved in the last backward pass, per sample.

    Attributes:
        steps: (batch,) products with J^T.
        residual: (batch,) weighted norm of the residual, relative to that of g.
        error_bound: (batch,) bound on the weighted norm of the error of g against the adjoint at the exact fixed point,
            relative to that of g; for monotone cells whose Jacobian may be larger than 1, on the Euclidean norm; inf
            where nothing is proven.
        converged: (batch,) whether the tolerance was reached.
        bounded: whether bounds of the error were sought, rounding included.
    """

    steps: Tensor
    residual: Tensor
    error_bound: Tensor
    converged: Tensor
    bounded: bool

    @property
    def certified(self) -> bool:
        """Whether every error bound is proven; waits for the device."""
        return self.bounded and bool(self.error_bound.isfinite().all())

    def of_samples(self, batch: int) -> AdjointSolution:
        """Of systems of so many samples each: every sample carries what is known of its system."""
        parts: dict[str, Any] = {
            k: v.repeat_interleave(batch, 0) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fixed point, what is proven of it, and what it cost, per sample.

    Attributes:
        value: (batch, ...) the returned point.
        lower, upper: (batch, ...) entrywise bounds of the fixed point; None for cells without verified structure.
        steps: (batch,) evaluations of f and products with its Jacobian, those of the verification included; what sets a
            method up for the whole batch is not among them.
        residual: (batch,) max_i |f(y) - y|_i / f(y)_i at the last point y where f was evaluated; where samples may influence
            each other, that of the returned values y: max_i |f(y) - y|_i / max_i |f(y)|_i of the worst sample of the batch.
        error_bound: (batch,) bound on max_i |value - z*|_i / z*_i; inf where there is none. Samples whose fixed point is
            not known to be positive: on max_i |value - z*|_i / max_j max(|z*_j|, |b_j|).
        rate: (batch,) the last residual ratio, an estimate (no proof) of the spectral radius of the Jacobian.
        converged: (batch,) whether the tolerance was reached; by the residual where nothing is proven, and then not where a
            sample only stayed at its start, to which f does not come back from near by.
        proven: (batch,) whether the enclosure is proven, rounding accounted for.
        proof_dtype: dtype of the arithmetic that proved enclosures, or None where no proof was wanted or possible.
        stopping: "enclosure" (certified error) or "residual".
        adjoint: filled in by the backward pass.
    """

    value: Tensor
    lower: Tensor | None
    upper: Tensor | None
    steps: Tensor
    residual: Tensor
    error_bound: Tensor
    rate: Tensor
    converged: Tensor
    proven: Tensor
    proof_dtype: torch.dtype | None
    stopping: Literal["enclosure", "residual"]
    adjoint: AdjointSolution | None = None

    @property
    def certified(self) -> bool:
        """Whether the enclosure of every sample is proven; waits for the device."""
        return self.proof_dtype is not None and bool(self.proven.all())

    def detach(self) -> Solution:
        return replace(self, value=self.value.detach())

    def of_samples(self, batch: int) -> Solution:
        """Of systems of so many samples each: every sample carries what is known of its system."""
        each = ("steps", "residual", "error_bound", "rate", "converged", "proven")
        parts: dict[str, Any] = {name: getattr(self, name).repeat_interleave(batch) for name in each}
        return replace(self, value=self.value.flatten(0, 1), lower=None, upper=None, **parts)

    @classmethod
    def joined(cls, parts: list[Solution]) -> Solution:
        """The solution of all samples, from those of several batches."""
        first = parts[0]
        if len(parts) == 1:
            return first
        found: dict[str, Any] = {}
        for name, value in vars(first).items():
            every = [getattr(p, name) for p in parts]
            if isinstance(value, Tensor):
                found[name] = torch.cat(every) if all(isinstance(e, Tensor) for e in every) else None
            elif name in ("lower", "upper", "proof_dtype") and any(e != value for e in every):
                found[name] = None
        return replace(first, **found)

    def merged(self, rest: Solution, index: Tensor) -> Solution:
        """The samples of `index` taken from `rest` unless what is known here is better; its evaluations are added."""
        parts: dict[str, Any] = {"steps": self.steps.index_add(0, index, rest.steps)}
        better = (rest.error_bound <= self.error_bound[index]).nonzero().flatten()
        index = index[better]
        for name in ("value", "lower", "upper", "residual", "error_bound", "rate", "converged", "proven"):
            old, new = getattr(self, name), getattr(rest, name)
            if old is not None:
                parts[name] = old.index_copy(0, index, new[better].to(old.dtype))
        return replace(self, **parts)
