"""What every theory answers, each in its own file.

A theory is decided once, where a cell meets its injections, and travels in the problem. It says what it proves for every
input (`certify`), of one batch (`at`), of a gradient (`bound_gradient`), and of a whole box of injections (`moved`). Nobody
asks which theory it is: solvers read its tags.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from perron._numerics.batch import per_sample
from perron._numerics.interval import Interval
from perron.cells.chain import Chain
from perron.cells.map import Linearization, Map
from perron.cells.refusal import Refusal
from perron.theory.certificate import Certificate

__all__ = [
    "Aim",
    "Attempt",
    "Batch",
    "Conclusion",
    "Correction",
    "Enclosure",
    "Facts",
    "Found",
    "GradientAim",
    "GradientBound",
    "Near",
    "Origin",
    "RankOne",
    "Searched",
    "Sign",
    "Solve",
    "Solved",
    "Theory",
]


class Sign(Enum):
    """What is known of every entry of an injection."""

    POSITIVE = "positive"
    NONNEGATIVE = "nonnegative"
    ANY = "of any sign"


class Near(Refusal):
    """All that a theory needs was verified, but for one number.

    Attributes:
        number: what should be below 1; inf where it is none.
    """

    def __init__(self, message: str, number: float) -> None:
        super().__init__(message)
        self.number = number


# ----------------------------------------------------------------------------------------------------------- one batch


@dataclass(frozen=True, kw_only=True)
class Enclosure:
    """`lower <= z* <= upper` for the samples where `proven` holds.

    Attributes:
        lower, upper: (batch, ...) in the precision of the proof.
        proven: (batch,) whether the bounds are proven.
        proof_dtype: dtype of the arithmetic.
        residual: (batch,) max_i |f(y) - y|_i / f(y)_i at the upper trial point, or of the largest entry where the sign of the
            fixed point is not known.
        evaluations: of f or its Jacobian, per sample, that the proof took.
    """

    lower: Tensor
    upper: Tensor
    proven: Tensor
    proof_dtype: torch.dtype
    residual: Tensor
    evaluations: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A cell with a batch of injections, in the precisions of a solve.

    Attributes:
        map, injection: in the precision of the proof; of rigorous sums if something is to be proven.
        steps_map, steps_injection: in the precision of the steps before the proof.
        working: the precision of the layer.
        proving: whether bounds are to account for rounding; else they are observed only.
        fixed: None, or in how many evaluations all has to be done, without waiting for the device.
    """

    map: Chain
    injection: Tensor
    steps_map: Chain
    steps_injection: Tensor
    working: torch.dtype
    proving: bool
    fixed: int | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where searches begin: p = f(0) and f(p), (batch, ...) each; the fixed point lies above both.

    Attributes:
        base: where f is one activation of z, its argument at z = 0; else p.
    """

    p: Tensor
    at_p: Tensor
    base: Tensor


@dataclass(frozen=True, kw_only=True)
class Aim:
    """How near to the fixed point a search has to get, and where it starts.

    Attributes:
        goal: of the residual's measure, a number or (batch,).
        slack: (batch, ...) what the residual is divided by, entrywise; None for the largest entry of f(z).
        start: (batch, ...), or None where the method knows better.
        origin: what its method may begin with.
    """

    goal: float | Tensor
    slack: Tensor | None
    start: Tensor | None = None
    origin: Origin | None = None


class Found(Protocol):
    """Where a search ended, per sample; see `perron.solvers.iteration.Found`."""

    @property
    def value(self) -> Tensor: ...

    @property
    def candidate(self) -> Tensor: ...

    @property
    def measure(self) -> Tensor: ...

    @property
    def rate(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What the searches have found, in the precision of the proof, all samples.

    Attributes:
        value: f at the last point of the first search.
        candidate: where the last search would have gone next.
        push: (batch,) see `Facts.push`.
    """

    value: Tensor
    candidate: Tensor
    push: Tensor


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One proof.

    Attributes:
        found: what it gave.
        point, image: (batch, ...) where f was evaluated for it, and f there.
    """

    found: Enclosure
    point: Tensor
    image: Tensor


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What is returned of a batch.

    Attributes:
        value: (batch, ...) in the layer's precision.
        lower, upper: (batch, ...) in the layer's precision; None where nothing at all is proven.
        bound: (batch,) on the error of the value; inf where nothing is proven.
        residual: (batch,).
        converged: (batch,) whether the tolerance was reached.
        proven: (batch,) whether the bounds are proven.
        proof_dtype: None where nothing was proven, or nothing was to be.
    """

    value: Tensor
    lower: Tensor | None
    upper: Tensor | None
    bound: Tensor
    residual: Tensor
    converged: Tensor
    proven: Tensor
    proof_dtype: torch.dtype | None


class Correction(Protocol):
    """About (I - J)^{-1} residual, given f(z) and the residual f(z) - z, from a model of the cell."""

    def __call__(self, image: Tensor, residual: Tensor, /) -> Tensor: ...


class Facts(ABC):
    """What a theory says of one batch: how to aim a search, how to prove what it found, how to aim the next one.

    Where indices of samples are asked for, None stands for all.

    Attributes:
        searches: how often it is worth to search again, in the precision of the proof, for what is left.
        evaluations: of f, of every sample, that the facts took.
    """

    searches: ClassVar[int]
    evaluations: int

    @abstractmethod
    def reserve(self, *, fixed: bool) -> int:
        """Evaluations that a search has to leave for the proofs after it."""

    @abstractmethod
    def proofs(self, room: int) -> int:
        """How many attempts may be made at what a search found, each from the point that the one before has left."""

    @abstractmethod
    def nothing(self) -> Enclosure:
        """What is known of the batch before the first proof."""

    @abstractmethod
    def aim(self, guess: Tensor | None, tol: float) -> Aim:
        """Of the first search."""

    @abstractmethod
    def aim_again(self, left: Tensor, best: Enclosure, last: Searched, tol: float) -> Aim:
        """Of another search, for the samples of `left`, from the enclosures and the points found so far."""

    @abstractmethod
    def push(self, index: Tensor | None, found: Found) -> Tensor:
        """(samples,) how far, relatively, the candidates of a search seem to be from their fixed points."""

    @abstractmethod
    def promising(self, push: Tensor, tol: float) -> Tensor | None:
        """(samples,) whether a proof is worth its evaluation; None where it always is."""

    @abstractmethod
    def prepare(
        self, z: Tensor, push: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        """The candidates of all samples and their `push`, made ready for the one attempt in a fixed number of steps."""

    @abstractmethod
    def attempt(self, index: Tensor | None, z: Tensor, push: Tensor) -> Attempt:
        """A proof at the candidates z of these samples; one evaluation of f."""

    @abstractmethod
    def closer(
        self, index: Tensor, attempt: Attempt, kept: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        """New candidates, and their `push`, from the exact residual that an attempt has left.

        Args:
            index: of the samples in the batch.
            attempt: at these samples and others.
            kept: indices of these samples in the attempt.
            rate: (samples,) the last ratios of residuals.
            correct: of a model of the cell, if there is one.
        """

    @abstractmethod
    def accepted(self, found: Enclosure, tol: float, index: Tensor | None = None) -> Tensor:
        """(samples,) whether the enclosures are within the tolerance."""

    @abstractmethod
    def conclude(self, best: Enclosure, tol: float) -> Conclusion:
        """What is returned of all samples."""


# ------------------------------------------------------------------------------------------------------------ gradients


class RankOne(Protocol):
    """A rank-one model of a cell, r c^T; only `rows` serve here."""

    @property
    def rows(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class GradientAim:
    """How near to the adjoint a search has to get.

    Attributes:
        goal: of the residual, a number or (batch,).
        weights: (batch, ...) of the norm that it is measured in, or None.
        room: a number or (batch,): a residual that many times the tolerance is within it.
    """

    goal: Tensor | float
    weights: Tensor | None
    room: Tensor | float


class GradientBound(ABC):
    """A bound on the error of the adjoint g = J^T g + v of one batch, from bounds of its fixed point.

    Attributes:
        improves: whether `finish` takes one product more, which improves on the candidate; else it judges what was found.
    """

    improves: ClassVar[bool]

    @abstractmethod
    def aim(self, tol: float, v: Tensor) -> GradientAim: ...

    @abstractmethod
    def finish(self, z: Tensor, candidate: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g; and (batch,) its relative residual, and the bound of its relative error."""


# ---------------------------------------------------------------------------------------------------------------- boxes


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What a solve in float64 has proven of a batch.

    Attributes:
        lower, upper: (batch, ...).
        proven: (batch,) whether z* lies between them.
        bounded: (batch,) whether the relative error is bounded as well.
    """

    lower: Tensor
    upper: Tensor
    proven: Tensor
    bounded: Tensor

    def where_proven(self, box: Interval) -> Interval:
        """The box; NaN where the enclosure that it comes from is not proven, or where it is not finite."""
        proven = per_sample(self.proven, box.lower) & box.lower.isfinite() & box.upper.isfinite()
        return Interval(torch.where(proven, box.lower, torch.nan), torch.where(proven, box.upper, torch.nan))


Solve = Callable[[Tensor], Solved]


# --------------------------------------------------------------------------------------------------------------- theory


class Theory(ABC):
    """What is proven, and how.

    Attributes:
        kind: its name, for people.
        picard_converges: whether Picard's steps are sure to reach the fixed point, for every input.
        rises: whether Picard's iterates rise from zero to the fixed point, so that each of them is a bound; then its
            inequalities hold in float32, too, and without them errors can be observed.
        splits: whether operator splitting is what is sure to reach it.
        orthant: whether it is about nonnegative injections only, and fixed points in the orthant.
        by_sample: whether single samples are better served by whichever metric F contracts in there, which is then
            `perron.theory.contracting`.
    """

    kind: ClassVar[str]
    orthant: ClassVar[bool] = False
    by_sample: ClassVar[bool] = False
    rises: ClassVar[bool] = False
    splits: ClassVar[bool] = False

    @property
    def picard_converges(self) -> bool:
        return not self.splits

    @abstractmethod
    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        """What is proven for every injection of that sign, from the actual weights.

        Raises:
            Refusal: nothing is proven; `Near` if a single number is in the way.
        """

    @abstractmethod
    def at(self, batch: Batch) -> Facts:
        """What is proven of these injections.

        Raises:
            Refusal: the theory says nothing of this cell.
        """

    @abstractmethod
    def bound_gradient(
        self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], *, model: RankOne | None, fixed: bool
    ) -> GradientBound | None:
        """How the error of adjoints is bounded, from proven bounds of the fixed points; None where nothing is known.

        Args:
            chain, injection, bounds: of one batch.
            model: of the chain, if it has one.
            fixed: whether nothing may wait for the device.
        """

    @abstractmethod
    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        """Bounds of the fixed points of all injections in a box, float64; NaN where there are none.

        Args:
            chain: in float64.
            b: the box, (batch, ...).
            solve: proves enclosures of the fixed points for single injections (batch, ...).
        """

    def splits_linear(self, chain: Chain) -> bool:
        """Whether operator splitting is sure to solve the linear equations at a fixed point."""
        return self.splits

    def linearize(self, map: Map, z: Tensor, injection: Tensor) -> Linearization:
        """J at a fixed point."""
        return map.linearize(z, injection)
