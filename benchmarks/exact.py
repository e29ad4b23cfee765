"""Fixed points of small cells, and adjoints at them, in several hundred bits: what float64 is judged by.

Newton's method from a guess, or from above; its result is accepted by what it leaves of z = f(z). For a positive concave
cell that is a proof: with |f(z) - z| <= eta f(0) entrywise, (1 - eta) z <= z* <= z/(1 - eta), since f((1 - eta) z) >=
(1 - eta) f(z) + eta f(0). For others the last Newton step says how far z* is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mpmath
import torch
from mpmath import mpf
from torch import Tensor

from perron.activations import Activation
from perron.cells import (
    ActivationStep,
    AffineStep,
    Chain,
    ClampStep,
    ConvolutionStep,
    DiagonalLowRankStep,
    InjectStep,
    MonotoneConvolutionStep,
    NormalizeStep,
    PoolStep,
    SparseStep,
)

__all__ = [
    "ExactCell",
    "Matrix",
    "Truth",
    "channel_product",
    "exact_channels",
    "numbers",
    "positive_pivots",
    "product",
    "radius",
]

Vector = list[mpf]
Matrix = list[Vector]

# Bits of the arithmetic: the first that leaves little enough serves.
_PRECISIONS = (320, 900, 2600)
_NEWTON_STEPS = 80
_ACCURACY = mpf(2) ** -100


def _tanh(v: mpf) -> tuple[mpf, mpf]:
    s = mpmath.tanh(v)
    return s, 1 - s * s


def _sigmoid(v: mpf) -> tuple[mpf, mpf]:
    s = 1 / (1 + mpmath.exp(-v))
    return s, s * (1 - s)


def _sqrt_shift(v: mpf) -> tuple[mpf, mpf]:
    s = mpmath.sqrt(v + mpf(0.25))
    return s, 1 / (2 * s)


_VALUE_AND_SLOPE: dict[str, Callable[[mpf], tuple[mpf, mpf]]] = {
    "tanh": _tanh,
    "softsign": lambda v: (v / (1 + abs(v)), 1 / (1 + abs(v)) ** 2),
    "relu6": lambda v: (min(max(v, mpf(0)), mpf(6)), mpf(0 < v < 6)),
    "sigmoid": _sigmoid,
    "one_minus_exp": lambda v: (-mpmath.expm1(-v), mpmath.exp(-v)),
    "arctan": lambda v: (mpmath.atan(v), 1 / (1 + v * v)),
    "erf": lambda v: (mpmath.erf(v), 2 * mpmath.exp(-v * v) / mpmath.sqrt(mpmath.pi)),
    "log1p": lambda v: (mpmath.log1p(v), 1 / (1 + v)),
    "sqrt_shift": _sqrt_shift,
    "relu": lambda v: (max(v, mpf(0)), mpf(v > 0)),
    "identity": lambda v: (v, mpf(1)),
}


def _activate(activation: Activation, v: mpf) -> tuple[mpf, mpf]:
    """sigma(v) and sigma'(v)."""
    if activation.inner is None:
        return _VALUE_AND_SLOPE[activation.name](v)
    base, shift, power = activation.inner
    value, slope = _activate(base, v)
    value += mpf(shift)
    if power == 1:
        return value, slope
    return value ** mpf(power), mpf(power) * slope * value ** (mpf(power) - 1)


@dataclass(frozen=True)
class Truth:
    """z* = high + low up to `error`, entrywise, (batch, ...) float64; NaN where it was not found.

    Attributes:
        points: what was found, in all its digits: one list per sample, or None.
    """

    high: Tensor
    low: Tensor
    error: Tensor
    points: tuple[Vector | None, ...] = ()

    def exceeds(self, bound: Tensor) -> Tensor:
        """(batch,) whether z* is certainly above a bound in some entry."""
        return self._beyond(self.high - bound.double(), self.low, bound)

    def falls_below(self, bound: Tensor) -> Tensor:
        """(batch,) whether z* is certainly below a bound in some entry."""
        return self._beyond(bound.double() - self.high, -self.low, bound)

    def _beyond(self, difference: Tensor, low: Tensor, bound: Tensor) -> Tensor:
        # A NaN is no bound.
        wrong = (difference + low > self.error) | bound.isnan()
        return wrong.flatten(1).any(1) & self.known

    def spread(self, shape: torch.Size) -> Truth:
        """The same for states of equal entries, of which this one is known."""
        return Truth(self.high.expand(shape), self.low.expand(shape), self.error.expand(shape))

    @property
    def known(self) -> Tensor:
        return ~self.high.isnan().flatten(1).any(1)

    def distance(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """|value - z*|, and what is certain of it."""
        found = ((value.double() - self.high) - self.low).abs()
        return found, (found - self.error).clamp_min(0)


class ExactCell:
    """A chain on states of one small shape, evaluated with its Jacobian on lists of numbers."""

    def __init__(self, chain: Chain, shape: torch.Size) -> None:
        self.shape, self.size = shape, shape.numel()
        self.chain = chain.to(torch.float64)
        self.steps: list[tuple[Matrix, Vector] | InjectStep | ActivationStep | ClampStep | NormalizeStep] = []
        with mpmath.workprec(_PRECISIONS[-1]):
            for step in self.chain.steps:
                if isinstance(step, AffineStep):
                    matrix, shape = _matrix(step, shape)
                    offset = [mpf(0)] * len(matrix)
                    if step.bias is not None:
                        bias = step.bias.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
                        offset = numbers(bias)
                    self.steps.append((matrix, offset))
                else:
                    self.steps.append(step)

    @classmethod
    def on_constants(cls, chain: Chain) -> ExactCell:
        """A chain of circulant matrices on states whose entries are all equal, as a cell of one unknown."""
        cell = cls(Chain(tuple(s for s in chain.steps if not isinstance(s, AffineStep))), torch.Size([1]))
        with mpmath.workprec(_PRECISIONS[-1]):
            cell.steps = [
                ([[sum(numbers(s.weights[0][0]), mpf(0))]], [mpf(0)]) if isinstance(s, AffineStep) else s
                for s in chain.steps
            ]
        return cell

    def __call__(self, z: Vector, injection: Vector) -> tuple[Vector, Matrix]:
        """f(z; b) and J."""
        v, jacobian = z, None
        for step in self.steps:
            if isinstance(step, tuple):
                matrix, offset = step
                v = [
                    sum((a * x for a, x in zip(row, v, strict=True) if a), c)
                    for row, c in zip(matrix, offset, strict=True)
                ]
                jacobian = [row[:] for row in matrix] if jacobian is None else product(matrix, jacobian)
            elif isinstance(step, InjectStep):
                v = [x + b for x, b in zip(v, injection, strict=True)]
            elif isinstance(step, ActivationStep | ClampStep):
                found = _clamp(step, v) if isinstance(step, ClampStep) else [_activate(step.activation, x) for x in v]
                v = [value for value, _ in found]
                jacobian = identity(len(v)) if jacobian is None else jacobian
                jacobian = [[d * a for a in row] for (_, d), row in zip(found, jacobian, strict=True)]
            else:
                jacobian = identity(len(v)) if jacobian is None else jacobian
                v, jacobian = _normalize(step, v, jacobian)
        return v, identity(len(v)) if jacobian is None else jacobian

    def truth(self, injection: Tensor, guess: Tensor, *, concave: bool) -> Truth:
        """Fixed points of a batch of injections, (batch, ...)."""
        points: list[Vector | None] = []
        parts: list[tuple[list[float], list[float], list[float]]] = []
        for b, start in zip(injection.double(), guess.double(), strict=True):
            if not bool(b.isfinite().all()):
                points.append(None)
                parts.append(([math.nan] * self.size,) * 3)
                continue
            point, error = self.fixed_point(numbers(b), start.flatten().tolist(), concave=concave)
            points.append(point)
            if point is None:
                parts.append(([math.nan] * self.size,) * 3)
                continue
            high = [float(x) for x in point]
            low = [0.0 if math.isinf(h) else float(x - mpf(h)) for x, h in zip(point, high, strict=True)]
            sizes = [abs(h) for h in high] if concave else [max(abs(h) for h in high)] * self.size
            # A subnormal number has no digits left for `low`; beyond the range of float64 none is needed.
            share = float(error)
            errors = [0.0 if math.isinf(h) else share * s + 5e-324 for h, s in zip(high, sizes, strict=True)]
            parts.append((high, low, errors))
        found = torch.tensor(parts, dtype=torch.float64).view(len(parts), 3, *self.shape)
        return Truth(found[:, 0], found[:, 1], found[:, 2], tuple(points))

    def fixed_point(self, b: Vector, guess: Sequence[float], *, concave: bool) -> tuple[Vector | None, mpf]:
        """z*, or None, and a bound on its relative error: of every entry if concave, else of the largest."""
        for bits in _PRECISIONS:
            with mpmath.workprec(bits):
                for start in self._starts(b, guess, concave):
                    z, error = self._newton(b, start, concave)
                    if z is not None and error <= _ACCURACY:
                        return z, error
        return None, mpf("inf")

    def _starts(self, b: Vector, guess: Sequence[float], concave: bool) -> Iterable[Vector]:
        if all(math.isfinite(x) for x in guess):
            yield [mpf(x) for x in guess]
        if not concave:
            yield [mpf(0)] * self.size
            return
        # A constant above the fixed point: from there Newton's steps fall to it.
        constant = max(b) + 1
        for _ in range(1200):
            top = [constant] * self.size
            if all(x <= constant for x in self(top, b)[0]):
                yield top
                return
            constant *= 2

    def _newton(self, b: Vector, z: Vector, concave: bool) -> tuple[Vector | None, mpf]:
        accuracy = mpf(2) ** -(2 * mpmath.mp.prec // 3)
        floor = self([mpf(0)] * self.size, b)[0] if concave else None
        done = False
        for _ in range(_NEWTON_STEPS):
            value, jacobian = self(z, b)
            residual = [f - x for f, x in zip(value, z, strict=True)]
            if done:
                return z, self._error(z, value, residual, floor, jacobian)
            step = _solve(_system(jacobian), residual)
            if step is None:
                return None, mpf("inf")
            z = [x + s for x, s in zip(z, step, strict=True)]
            if floor is not None:
                z = [max(x, f) for x, f in zip(z, floor, strict=True)]
                done = all(abs(s) <= accuracy * x for s, x in zip(step, z, strict=True))
            else:
                done = max(abs(s) for s in step) <= accuracy * max(abs(x) for x in z)
        return None, mpf("inf")

    def _error(self, z: Vector, value: Vector, residual: Vector, floor: Vector | None, jacobian: Matrix) -> mpf:
        noise = mpf(2) ** (12 - mpmath.mp.prec)
        if floor is not None:
            # Entries that f never leaves at zero bind nothing.
            terms = [
                (abs(r) + noise * f) / g if g else mpf("inf")
                for r, f, g in zip(residual, value, floor, strict=True)
                if f or r
            ]
            return 2 * max(terms, default=mpf(0))
        size = max(abs(x) for x in z)
        if not size:
            return mpf(0)
        left = [abs(r) + noise * (abs(f) + size) for r, f in zip(residual, value, strict=True)]
        step = _solve(_system(jacobian), left)
        return mpf("inf") if step is None else 4 * (max(abs(s) for s in step) + max(left)) / size

    def adjoint(self, z: Vector, b: Vector, v: Vector) -> Vector | None:
        """g = J(z)^T g + v."""
        with mpmath.workprec(_PRECISIONS[1]):
            system = _system(self(z, b)[1])
            return _solve([list(column) for column in zip(*system, strict=True)], v)


def numbers(t: Tensor) -> Vector:
    return [mpf(x) for x in t.double().flatten().tolist()]


def identity(n: int) -> Matrix:
    return [[mpf(i == j) for j in range(n)] for i in range(n)]


def product(a: Matrix, b: Matrix) -> Matrix:
    columns = list(zip(*b, strict=True))
    return [
        [sum((x * y for x, y in zip(row, column, strict=True) if x and y), mpf(0)) for column in columns] for row in a
    ]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def _system(jacobian: Matrix) -> Matrix:
    """I - J."""
    return [[(i == j) - a for j, a in enumerate(row)] for i, row in enumerate(jacobian)]


def _solve(system: Matrix, right: Vector) -> Vector | None:
    """Gaussian elimination with pivots by size; None where a pivot vanishes."""
    n = len(system)
    rows = [[*row, r] for row, r in zip(system, right, strict=True)]
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        if not rows[k][k]:
            return None
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            if factor:
                rows[i] = [
                    *rows[i][: k + 1],
                    *(x - factor * y for x, y in zip(rows[i][k + 1 :], rows[k][k + 1 :], strict=True)),
                ]
    found: Vector = [mpf(0)] * n
    for k in range(n - 1, -1, -1):
        found[k] = (rows[k][n] - sum((rows[k][j] * found[j] for j in range(k + 1, n)), mpf(0))) / rows[k][k]
    return found


def _clamp(step: ClampStep, v: Vector) -> list[tuple[mpf, mpf]]:
    """min(max(v, l), u) and its slope, with that inside at a kink."""
    lower, upper = (numbers(limit) * (1 if limit.dim() else len(v)) for limit in step.tensors)
    return [(min(max(x, a), b), mpf(a <= x <= b)) for x, a, b in zip(v, lower, upper, strict=True)]


def _normalize(step: NormalizeStep, v: Vector, jacobian: Matrix) -> tuple[Vector, Matrix]:
    """v / |v|_p over the whole state, and its derivative: dv/N - v dN/N^2."""
    if math.isinf(step.p):
        at = max(range(len(v)), key=lambda i: abs(v[i]))
        norm = abs(v[at])
        weights = [mpmath.sign(x) if i == at else mpf(0) for i, x in enumerate(v)]
    else:
        p = mpf(step.p)
        norm = sum((abs(x) ** p for x in v), mpf(0)) ** (1 / p)
        weights = [mpmath.sign(x) * (abs(x) / norm) ** (p - 1) for x in v]
    change = product([weights], jacobian)[0]
    moved = [
        [(a - x / norm * c) / norm for a, c in zip(row, change, strict=True)]
        for x, row in zip(v, jacobian, strict=True)
    ]
    return [x / norm for x in v], moved


def _matrix(step: AffineStep, shape: torch.Size) -> tuple[Matrix, torch.Size]:
    """The exact matrix of a float64 step on states of `shape`, and the shape of its values."""
    if isinstance(step, DiagonalLowRankStep):
        diagonal, left, right = ([numbers(row) for row in w.view(len(w), -1)] for w in step.weights)
        mixed = product(left, transposed(right)) if left[0] else [[mpf(0)] * len(left) for _ in left]
        return [[x + (i == j) * diagonal[i][0] for j, x in enumerate(row)] for i, row in enumerate(mixed)], shape
    if isinstance(step, MonotoneConvolutionStep):
        n = shape.numel()
        kernel, skew = (_circular(w, shape) for w in step.weights)
        gram = product(transposed(kernel), kernel)
        return [[(i == j) * mpf(step.identity) - gram[i][j] + skew[i][j] for j in range(n)] for i in range(n)], shape
    # Every entry is a single product with 1, hence exact.
    images = step.linear(torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape))
    rows = images.flatten(1).t().tolist()
    if isinstance(step, PoolStep):
        return [[mpf(1) / round(1 / x) if x else mpf(0) for x in row] for row in rows], images.shape[1:]
    return [[mpf(x) for x in row] for row in rows], images.shape[1:]


def channel_product(chain: Chain, *, absolute: bool = False) -> Matrix:
    """The exact product of the affine steps, or of their absolute values, on states that are constant over space."""
    found: Matrix | None = None
    with mpmath.workprec(_PRECISIONS[-1]):
        for step in chain.affine:
            # Averages of a constant are that constant.
            if not isinstance(step, PoolStep):
                matrix = exact_channels(step, absolute=absolute)
                found = matrix if found is None else product(matrix, found)
    assert found is not None
    return found


def radius(matrix: Matrix) -> float:
    """The spectral radius, to float64's accuracy; 0 where LAPACK does not find it, as over hundreds of decades."""
    rounded = torch.tensor([[float(x) for x in row] for row in matrix], dtype=torch.float64)
    try:
        return float(torch.linalg.eigvals(rounded).abs().max())
    except torch.linalg.LinAlgError:
        return 0.0


def exact_channels(step: AffineStep, *, absolute: bool = False) -> Matrix:
    """The exact matrix of a step, or its absolute values, on states that are constant over an unbounded space."""
    with mpmath.workprec(_PRECISIONS[-1]):
        if isinstance(step, PoolStep):
            return identity(1)
        if isinstance(step, ConvolutionStep):
            return [
                [sum((abs(t) if absolute else t for t in numbers(taps)), mpf(0)) for taps in row]
                for row in step.weights[0].detach()
            ]
        step = step.rebind([t.detach().double() for t in step.tensors])
        columns = step.pattern.shape[1] if isinstance(step, SparseStep) else step.weights[0].shape[-1]
        matrix, _ = _matrix(step, torch.Size([columns]))
    return [[abs(x) for x in row] for row in matrix] if absolute else matrix


def _circular(kernel: Tensor, shape: torch.Size) -> Matrix:
    """The matrix of a circular convolution; on images smaller than the kernel several taps meet."""
    channels, height, width = shape
    taps = kernel.tolist()
    centre = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    matrix = [[mpf(0)] * shape.numel() for _ in range(shape.numel())]
    for out in range(channels):
        for y in range(height):
            for x in range(width):
                row = matrix[(out * height + y) * width + x]
                for inside in range(channels):
                    for i, line in enumerate(taps[out][inside]):
                        for j, tap in enumerate(line):
                            at = (y + i - centre[0]) % height, (x + j - centre[1]) % width
                            row[(inside * height + at[0]) * width + at[1]] += mpf(tap)
    return matrix


def positive_pivots(matrix: Matrix) -> bool:
    """Whether elimination without exchanges meets positive pivots only.

    For a symmetric matrix that is to be positive definite; for I - M with M >= 0, that the spectral radius of M is below 1.
    """
    with mpmath.workprec(_PRECISIONS[-1]):
        rows = [row[:] for row in matrix]
        for k, pivot in enumerate(rows):
            if not pivot[k] > 0:
                return False
            for row in rows[k + 1 :]:
                factor = row[k] / pivot[k]
                for j in range(k, len(row)):
                    row[j] -= factor * pivot[j]
    return True
