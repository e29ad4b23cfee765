"""The last inequality of every bound, proven for all real numbers by an SMT solver, and a mutant of it refuted.

Each claim takes the formula from the library itself, applied to terms of the solver, and states only what is known of f at
the points used: concavity along a segment, the contraction factor, the margin. Vectors enter by what holds of one entry or
of norms (Cauchy-Schwarz, the triangle inequality), which is where scalars stop.
"""

from collections.abc import Callable

import pytest
from z3 import And, ArithRef, BoolRef, If, Implies, Not, Q, Real, Solver, sat, unsat

from perron.theory.enclosure import chord_weights, super_scaling
from perron.theory.monotone_operator import amplification, distance
from perron.theory.posterior import rest
from perron.theory.weighted_norm import weighted_error

# (the claim, the same claim with a bound that is 1 % better)
Case = tuple[BoolRef, BoolRef]


def reals(names: str) -> list[ArithRef]:
    return [Real(name) for name in names.split()]


def size(x: ArithRef) -> ArithRef:
    return If(x >= 0, x, -x)


def both(known: BoolRef, claim: Callable[[object], BoolRef]) -> Case:
    """The claim for a factor of 1, and the mutant with one of 0.99 on what it bounds from above."""
    return Implies(known, claim(1)), Implies(known, claim(Q(99, 100)))


def lower_point() -> Case:
    """(1-s) p with (p - f(p)) <= m f(0) and s >= m lies below z*; the least such s is m/(1+m)."""
    f0, fp, p, m, s = reals("f0 fp p m s")
    known = And(f0 > 0, fp >= 0, p >= 0, m >= 0, m <= 1, p - fp <= m * f0, s <= 1)
    below = (1 - s) * fp + s * f0 >= (1 - s) * p
    return Implies(And(known, s >= m), below), Implies(And(known, s >= Q(99, 100) * m / (1 + m)), below)


def upper_point() -> Case:
    """(1+a) q with f(q) - q <= m f(0), m < 1, lies above z* for a >= m/(1-m)."""
    f0, fq, q, m, a = reals("f0 fq q m a")
    known = And(f0 > 0, fq >= 0, q >= 0, m >= 0, m < 1, fq - q <= m * f0)
    return both(known, lambda k: Implies(a >= k * super_scaling(m), (1 + a) * fq - a * f0 <= (1 + a) * q))


def upper_point_of_old() -> Case:
    """The scaling by 1.01 m, which holds for m up to 1/101 only."""
    f0, fq, q, m = reals("f0 fq q m")
    a = Q(101, 100) * m
    known = And(f0 > 0, fq >= 0, q >= 0, m >= 0, fq - q <= m * f0)
    above = (1 + a) * fq - a * f0 <= (1 + a) * q
    return Implies(And(known, m <= Q(1, 101)), above), Implies(And(known, m < 1), above)


def value_of_upper_point() -> Case:
    """f((1+a) q) <= (1+a) f(q) for a >= 0."""
    f0, fq, fy, a = reals("f0 fq fy a")
    known = And(f0 >= 0, fq >= 0, a >= 0, fy <= (1 + a) * fq - a * f0)
    return both(known, lambda k: fy <= k * (1 + a) * fq)


def chord() -> Case:
    """(1-t) x + t y lies below z* for r loss <= gain; the mutant goes a little farther."""
    fx, fy, x, y, gain, loss, r, more = reals("fx fy x y gain loss r more")
    stay, go = chord_weights(r)
    known = And(gain >= 0, loss >= 0, fx - x >= gain, y - fy <= loss, r >= 0, r * loss <= gain, x >= 0, y >= 0, fx >= 0)

    def claim(stay: ArithRef, go: ArithRef) -> BoolRef:
        return stay * fx + go * fy >= stay * x + go * y

    farther = And(more >= Q(1, 100), more <= stay)
    return Implies(known, claim(stay, go)), Implies(And(known, farther), claim(stay - more, go + more))


def rounded_chord() -> Case:
    """Weights with relative errors of their own move the bound by no more; a weight as what is left of 1 loses it."""
    fx, fy, r, d, e, u = reals("fx fy r d e u")
    stay, go = chord_weights(r)
    known = And(fx >= 0, fy >= 0, r >= 0, u > 0, u <= Q(1, 8), size(d) <= u, size(e) <= u)
    bound = (1 + u) * (stay * fx + go * fy)
    return (
        Implies(known, stay * (1 + d) * fx + go * (1 + e) * fy <= bound),
        Implies(known, stay * (1 + d) * fx + (1 - stay * (1 + d)) * fy <= bound),
    )


def extrapolation() -> Case:
    """p, z = f(p) = p + d, f(z) = z + e with e <= r d, r < 1: p + d/(1-r) lies above z*."""
    p, d, e, r, t, fy = reals("p d e r t fy")
    known = And(p >= 0, d >= 0, e >= 0, r >= 0, r < 1, e <= r * d, t >= 1)
    # Concavity along the ray from p through z to y = p + t d.
    known = And(known, fy <= t * (p + d + e) - (t - 1) * (p + d))
    return both(known, lambda k: Implies(t >= k / (1 - r), fy <= p + t * d))


def contraction() -> Case:
    """|F(z) - z*| <= q |z - z*|, in any metric: Thompson's takes logarithms."""
    z, fz, exact, q = reals("z fz exact q")
    known = And(q >= 0, q < 1, size(fz - exact) <= q * size(z - exact))
    return both(known, lambda k: size(fz - exact) <= k * rest(q, size(fz - z)))


def contraction_in_norms() -> Case:
    """The same with distances a = d(F(z), z*), b = d(z, z*), c = d(z, F(z)) and the triangle inequality alone."""
    a, b, c, q = reals("a b c q")
    known = And(a >= 0, b >= 0, c >= 0, q >= 0, q < 1, a <= q * b, b <= c + a)
    return both(known, lambda k: a <= k * rest(q, c))


def rounding_in_logarithms() -> Case:
    """fz = F (1 + r) + A: F/fz lies in 1 -/+ 2 share for share = |r| + |A|/fz <= 1/2, hence so do logarithms up to 2 share."""
    exact, fz, r, a, share = reals("exact fz r a share")
    known = And(fz > 0, fz == exact * (1 + r) + a, share >= size(r) + size(a) / fz, share < Q(1, 2))
    # exp(-2 x) <= 1 - x for 0 <= x <= 1/2 and exp(2 x) >= 1/(1 - x) there.
    return (
        Implies(known, And(exact <= fz / (1 - share), exact >= fz * (1 - share))),
        Implies(known, And(exact <= fz, exact >= fz * (1 - share))),
    )


def ball() -> Case:
    """|F(0)| + kappa R <= R for R = |F(0)|/(1 - kappa): F maps the ball into itself."""
    zero, image, z, kappa = reals("zero image z kappa")
    known = And(zero >= 0, kappa >= 0, kappa < 1)

    def claim(k: object) -> BoolRef:
        radius = k * zero / (1 - kappa)
        return Implies(And(size(z) <= radius, size(image) <= zero + kappa * size(z)), size(image) <= radius)

    return both(known, claim)


def weighted_norm() -> Case:
    """One row of A w <= kappa w, w > 0, A >= 0: then |A x|_i <= kappa w_i for |x| <= w."""
    a, b, v, w, x, y, kappa = reals("a b v w x y kappa")
    known = And(a >= 0, b >= 0, v > 0, w > 0, size(x) <= v, size(y) <= w, a * v + b * w <= kappa * v)
    return both(known, lambda k: size(a * x + b * y) <= k * kappa * v)


def strongly_monotone() -> Case:
    """m e^2 <= <W (z - y), e> <= image |e|."""
    e, image, m, product = reals("e image m product")
    known = And(e >= 0, image >= 0, m > 0, m * e * e <= product, product <= image * e)
    return both(known, lambda k: e <= k * distance(image, m))


def adjoint() -> Case:
    """a = ||g - g*||, b = ||c - g*||, residual = ||g - c||."""
    a, b, residual, spread, kappa = reals("a b residual spread kappa")
    known = And(a >= 0, b >= 0, residual >= 0, spread >= 0, kappa >= 0, kappa < 1)
    known = And(known, a <= kappa * b + spread, b <= residual + a)
    return both(known, lambda k: a <= k * weighted_error(kappa, residual, spread))


def adjoint_entry() -> Case:
    """One entry: g = J c + v with flat <= J, J* <= steep = kappa, and g* = J* g* + v."""
    g, exact, c, v, j, best, flat, kappa = reals("g exact c v j best flat kappa")
    known = And(flat >= 0, flat <= j, j <= kappa, flat <= best, best <= kappa, kappa < 1)
    known = And(known, g == j * c + v, exact == best * exact + v)
    return both(known, lambda k: size(g - exact) <= k * weighted_error(kappa, size(g - c), (kappa - flat) * size(c)))


def monotone_adjoint() -> Case:
    """y = D e with 0 <= D <= 1: m |y|^2 <= <r, y>, and |e| <= |W| |y| + |r|."""
    e, y, r, norm, m = reals("e y r norm m")
    known = And(e >= 0, y >= 0, r >= 0, norm >= 0, m > 0, m * y * y <= r * y, e <= norm * y + r)
    return both(known, lambda k: e <= k * amplification(norm, m) * r)


def monotone_adjoint_entry() -> Case:
    """One entry: e = W D e + r with 1 - W >= m."""
    e, r, w, d, m = reals("e r w d m")
    known = And(m > 0, 1 - w >= m, d >= 0, d <= 1, e == w * d * e + r)
    return both(known, lambda k: size(e) <= k * amplification(size(w), m) * size(r))


def relative_error() -> Case:
    """|value - z*|/z* from lower <= z* <= upper, lower > 0."""
    value, lower, upper, exact, gap = reals("value lower upper exact gap")
    known = And(lower > 0, lower <= exact, exact <= upper, gap >= upper - value, gap >= value - lower)
    return both(known, lambda k: size(value - exact) <= k * gap / lower * exact)


def degree_near_zero() -> Case:
    """v sigma'(v) <= sigma(v) - sigma(0), so v sigma'/(sigma + shift) is at most (top - at_zero)/(top + shift) for sigma <= top."""
    sigma, at_zero, top, shift, moved = reals("sigma at_zero top shift moved")
    known = And(at_zero >= 0, shift >= 0, sigma > at_zero, sigma <= top, moved <= sigma - at_zero)
    return both(known, lambda k: moved <= k * (top - at_zero) / (top + shift) * (sigma + shift))


CASES = [
    lower_point,
    upper_point,
    upper_point_of_old,
    value_of_upper_point,
    chord,
    rounded_chord,
    extrapolation,
    contraction,
    contraction_in_norms,
    rounding_in_logarithms,
    ball,
    weighted_norm,
    strongly_monotone,
    adjoint,
    adjoint_entry,
    monotone_adjoint,
    monotone_adjoint_entry,
    relative_error,
    degree_near_zero,
]


def refuted(claim: BoolRef) -> object:
    solver = Solver()
    solver.set("timeout", 60_000)
    solver.add(Not(claim))
    return solver.check()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.__name__)
def test_proven_for_all_reals_and_the_mutant_is_not(case: Callable[[], Case]) -> None:
    claim, mutant = case()
    assert refuted(claim) == unsat
    assert refuted(mutant) == sat
