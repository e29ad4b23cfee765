"""Mutation of the bounds: each is made 1 % too good, one at a time, and some test must fail.

A copy of the package is mutated, and the tests named with the mutant run on it. A mutant that passes them is not caught.

    python benchmarks/mutants.py --output benchmarks/results/mutants.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from perron._files import write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutant:
    """A bound that is too good.

    Attributes:
        bound: its name.
        path: the file, below src/perron.
        old, new: what stands there, exactly once, and what is put in its place.
        tests: files or names of tests that should notice.
    """

    bound: str
    path: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "scaling of the upper point",
        "theory/enclosure.py",
        "    return m / (1 - m)",
        "    return 0.99 * m / (1 - m)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "the same, as it was",
        "theory/enclosure.py",
        "    return m / (1 - m)",
        "    return 1.01 * m",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "scaling of the lower point",
        "theory/enclosure.py",
        "gain = torch.addcmul(shrink * low_zero, shrink - 1, miss).clamp_min_(0)",
        "gain = torch.addcmul(shrink * low_zero, shrink - 1, 0.99 * miss).clamp_min_(0)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "weight of the chord",
        "theory/enclosure.py",
        "    return 1 / (1 + r), r / (1 + r)",
        "    return 1 - 1.01 * r / (1 + r), 1.01 * r / (1 + r)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "weight of the chord as what is left of 1",
        "theory/enclosure.py",
        "    return 1 / (1 + r), r / (1 + r)",
        "    return 1 / (1 + r), 1 - 1 / (1 + r)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "lower bound",
        "theory/enclosure.py",
        ".mul_(1 - 32 * u)",
        ".mul_(1.01)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "upper bound",
        "theory/enclosure.py",
        "high_q.mul_(1 + grow)).mul_(1 + 32 * u)",
        "high_q.mul_(1 + grow)).mul_(0.99)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "value of f above the upper point",
        "theory/enclosure.py",
        "high_q.mul_(1 + grow)).mul_(1 + 32 * u)",
        "high_q.mul_(1 + 0.9 * grow)).mul_(1 + 32 * u)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "rounding of f",
        "theory/enclosure.py",
        "down, up = (1 - rounding.relative) * (1 - 8 * u), (1 + rounding.relative) * (1 + 8 * u)",
        "down, up = 1, 1",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "relative error bound",
        "theory/enclosure.py",
        "* (1 + 8 * unit_roundoff(lower.dtype))\n    # Without",
        "* 0.99\n    # Without",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "relative error bound of subnormal numbers",
        "theory/enclosure.py",
        "share = (gap / lower).clamp_min(",
        "share = (gap / lower.clamp_min(2.3e-308)).clamp_min(",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "rounding outwards",
        "theory/enclosure.py",
        "slack, least = 4 * unit_roundoff(dtype)",
        "slack, least = 0.25 * unit_roundoff(dtype)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "a lower bound beyond the range",
        "theory/enclosure.py",
        ".clamp_(0, most)",
        ".clamp_(0)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "distance left in the sup norm and in Thompson's metric",
        "theory/posterior.py",
        "    return q / (1 - q) * d",
        "    return 0.99 * q / (1 - q) * d",
        "tests/theory/test_contraction.py",
    ),
    Mutant(
        "underflow in Thompson's metric",
        "theory/thompson.py",
        "share = self.rounding.relative + self.rounding.absolute / least",
        "share = self.rounding.relative + 0 * least",
        "tests/theory/test_contraction.py",
    ),
    Mutant(
        "distance from a strongly monotone cell's fixed point",
        "theory/monotone_operator.py",
        "    return image / m",
        "    return 0.99 * image / m",
        "tests/theory/test_monotone_operator.py",
    ),
    Mutant(
        "error of the adjoint in the weighted norm",
        "theory/weighted_norm.py",
        "    return (kappa * residual + spread) / (1 - kappa)",
        "    return 0.99 * (kappa * residual + spread) / (1 - kappa)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "variation of the Jacobian in it",
        "theory/weighted_norm.py",
        "    return (kappa * residual + spread) / (1 - kappa)",
        "    return (kappa * residual + 0.99 * spread) / (1 - kappa)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "error of the adjoint of monotone cells",
        "theory/monotone_operator.py",
        "    return 1 + norm / m",
        "    return 0.99 * (1 + norm / m)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "Euclidean norm of tiny samples",
        "_numerics/batch.py",
        "flat / top.clamp_min(torch.finfo(t.dtype).tiny)",
        "flat / top.clamp_min(1)",
        "tests/_numerics/test_batch.py tests/theory/test_monotone_operator.py",
    ),
    Mutant(
        "row sums",
        "cells/affine_map.py",
        "        return found * (1 + 2 * gamma(self.terms + 12, torch.float64))",
        "        return found * 0.99",
        "tests/cells/test_affine.py::test_row_sums_are_those_of_the_very_weights",
    ),
    Mutant(
        "rounding of row sums",
        "cells/affine_map.py",
        "        return found * (1 + 2 * gamma(self.terms + 12, torch.float64))",
        "        return found",
        "tests/cells/test_affine.py::test_row_sums_are_those_of_the_very_weights",
    ),
    Mutant(
        "row sums in the precision of the weights",
        "cells/affine_map.py",
        "        found = self.exact().magnitude().largest_row()",
        "        found = self.magnitude().largest_row()",
        "tests/cells/test_affine.py::test_row_sums_are_those_of_the_very_weights",
    ),
    Mutant(
        "margin of a matrix",
        "cells/dense.py",
        "        return t - (2 * gamma(n + 4, torch.float64) * trace",
        "        return t + (2 * gamma(n + 4, torch.float64) * trace",
        "tests/cells/test_affine.py::test_margins_of_two_by_two_matrices",
    ),
    Mutant(
        "margin of a convolution",
        "cells/circular.py",
        "return math.nextafter(1 - self.identity, -math.inf)",
        "return (1 - self.identity) * 1.01",
        "tests/cells/test_affine.py::test_the_margin_of_a_convolution_is_that_of_what_it_multiplies_with",
    ),
    Mutant(
        "underflow inside of a low rank",
        "cells/low_rank.py",
        "return super().underflow(dtype) * (1 + 2 * largest(left.sum(1)))",
        "return super().underflow(dtype)",
        "tests/cells/test_affine.py::test_what_underflows_inside_of_a_product_is_bounded",
    ),
    Mutant(
        "terms of a transpose",
        "cells/convolution.py",
        "return max(inputs, outputs // self.groups) * math.prod(self.kernel)",
        "return inputs * math.prod(self.kernel)",
        "tests/cells/test_affine.py::test_terms_count_the_products_of_rows_and_of_columns",
    ),
    Mutant(
        "rounding of a chain",
        "_numerics/rounding.py",
        "return (first + second + first * second) * (1 + 2**-50)",
        "return (1 + first) * (1 + second) - 1",
        "tests/cells/test_cells.py::test_no_rounding_is_lost_beside_1",
    ),
    Mutant(
        "product of gains",
        "_numerics/rounding.py",
        "return near if near >= exact else math.nextafter(near, math.inf)",
        "return 0.99 * near",
        "tests/theory/test_contraction.py::test_the_gain_and_the_ball_are_attained_by_linear_maps",
    ),
    Mutant(
        "spectral radius",
        "theory/perron_vector.py",
        "PerronVector(factor=factor * (1 + 2 * gamma(roundings + 8, torch.float64)), weights=best)",
        "PerronVector(factor=0.99 * factor, weights=best)",
        "tests/theory/test_certificates.py::test_no_certificate_from_radius_1_on_and_one_right_below",
    ),
    Mutant(
        "underflow in a spectral radius",
        "theory/perron_vector.py",
        "w = step.linear(w) + step.underflow(torch.float64) + _LEAST",
        "w = step.linear(w)",
        "tests/theory/test_certificates.py::test_products_that_underflow_on_the_way_are_not_lost",
    ),
    Mutant(
        "radius of every graph",
        "nn/graph.py",
        "(1 + 4 * unit_roundoff(torch.float32))",
        "1",
        "tests/nn/test_graph.py::test_certificates_are_about_the_matrix_that_is_multiplied_with",
    ),
    Mutant(
        "degree of an activation",
        "activations.py",
        "return power * max(float(t) for t in found) * (1 + 1e-12)",
        "return 0.99 * power * max(float(t) for t in found)",
        "tests/theory/test_contraction.py::test_degrees_are_upper_bounds_and_sharp",
    ),
    Mutant(
        "degree of a norm",
        "cells/normalization.py",
        "        return 2.0, 0.0",
        "        return 1.98, 0.0",
        "tests/theory/test_contraction.py::test_degree_needs_nonnegative_weights_and_a_positive_cell",
    ),
    Mutant(
        "ball of the fixed points",
        "theory/contraction.py",
        "/ (1 - norm.factor) * (1 + 1e-12) + 1e-290",
        "/ (1 - norm.factor) * 0.99",
        "tests/theory/test_contraction.py::test_the_gain_and_the_ball_are_attained_by_linear_maps",
    ),
    Mutant(
        "factor of the weighted norm",
        "theory/contraction.py",
        "        top = amax(steep.matvec(trial) / trial) * (1 + 2 * gamma(terms + 4, w.dtype))",
        "        top = amax(steep.matvec(trial) / trial) * 0.99",
        "tests/theory/test_contraction.py::test_the_factor_of_the_weighted_norm_is_attained",
    ),
    Mutant(
        "underflow in it",
        "theory/contraction.py",
        " + 2 * lost / amin(trial)",
        "",
        "tests/theory/test_contraction.py::test_products_that_underflow_on_the_way_are_no_contraction",
    ),
    Mutant(
        "variation of slopes",
        "cells/jacobian.py",
        "most * w, most * change + (most - least) * w",
        "most * w, most * change + 0.99 * (most - least) * w",
        "tests/theory/test_contraction.py::test_slopes_and_their_variation_are_attained",
    ),
    Mutant(
        "variation passed on",
        "cells/jacobian.py",
        "most * w, most * change + (most - least) * w",
        "most * w, 0.5 * least * change + (most - least) * w",
        "tests/theory/test_contraction.py",
    ),
    Mutant(
        "shift of a monotone fixed point",
        "theory/monotone_operator.py",
        "return euclidean(radius) / margin(chain) *",
        "return 0.99 * euclidean(radius) / margin(chain) *",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "shift of a fixed point of bounded gain",
        "theory/contraction.py",
        "per_sample(gain(behind) *",
        "per_sample(0.99 * gain(behind) *",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "weighted norm of a whole layer",
        "theory/perron_vector.py",
        "most * (1 + 2 * gamma(self.roundings + 8, torch.float64))",
        "0.99 * most",
        "tests/theory/test_perron_vector.py",
    ),
    Mutant(
        "ball in a weighted norm",
        "theory/contraction.py",
        "ball * weights * (1 + 1e-15) + 1e-300",
        "0.99 * ball * weights",
        "tests/theory/test_perron_vector.py",
    ),
    Mutant(
        "shift in a weighted norm",
        "theory/contraction.py",
        "moved = passed * apart",
        "moved = 0.9 * passed * apart",
        "tests/theory/test_perron_vector.py",
    ),
    Mutant(
        "shift in Thompson's metric",
        "theory/thompson.py",
        "apart = (distance(chain, b, centre) + 1e-12)",
        "apart = 0.99 * (distance(chain, b, centre) + 1e-12)",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "Thompson distance behind an activation",
        "cells/elementwise.py",
        "return apart * self.degree(0.0)[0]",
        "return 0.99 * apart * self.degree(0.0)[0]",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "Thompson distance behind a norm",
        "cells/normalization.py",
        "        return apart * 2",
        "        return apart * 1.98",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "radius of a box",
        "_numerics/interval.py",
        "return centre, radius * (1 + 4 * _U)",
        "return centre, 0.99 * radius",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "box behind batch normalisation",
        "verify/interval.py",
        "spread = radius * scale.abs() +",
        "spread = 0.99 * radius * scale.abs() +",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "rounding behind batch normalisation",
        "verify/interval.py",
        "+ 2 * gamma(8, DTYPE) * size + _TINY",
        "+ _TINY",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "jump of torch's softplus",
        "verify/interval.py",
        "/ beta * (1 + 1e-12) + _TINY",
        "/ beta * 0.99 + _TINY",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "rounding of softplus injections",
        "verify/interval.py",
        "widened(low, high, 128 * _U) if injection",
        "widened(low, high, 0 * _U) if injection",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "rounding of an affine box",
        "cells/affine_map.py",
        "slack = 4 * gamma(self.terms + 8, lower.dtype) * magnitude.affine_image(centre.abs() + radius)",
        "slack = 0 * magnitude.affine_image(centre.abs() + radius)",
        "tests/verify/test_interval.py",
    ),
    Mutant(
        "quotients below the range in a chord",
        "theory/enclosure.py",
        "* (1 - 2048 * u) - tiny).clamp(0, 1 / u**2)",
        "* (1 - 2048 * u)).clamp(0, 1 / u**2)",
        "tests/theory/test_enclosure.py",
    ),
    Mutant(
        "slopes of values beyond the range",
        "cells/activation.py",
        "        value = value.clamp(sigma.at_zero, sigma.supremum)\n",
        "",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "underflow in the adjoint",
        "theory/weighted_norm.py",
        "    return 8 * (count + entries) *",
        "    return 0 * (count + entries) *",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "underflow before a norm",
        "cells/normalization.py",
        "relative = compound(before.relative, 2 * float(before.absolute) / LEAST_NORMALIZED)",
        "relative = before.relative",
        "tests/theory/test_contraction.py",
    ),
    Mutant(
        "slopes of an adjoint from one place",
        "theory/positive_concave.py",
        '(self.exact if rigorous is None else rigorous).linearize_at_fixed_point(start, "upper")',
        'None if rigorous is None else rigorous.linearize_at_fixed_point(start, "upper")',
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "steepest slope next to a limit",
        "cells/clamp.py",
        "outside = (upper < self.lower) | (lower > self.upper)",
        "outside = (upper <= self.lower) | (lower >= self.upper)",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "flattest slope next to a limit",
        "cells/clamp.py",
        "inside = (lower > self.lower) & (upper < self.upper)",
        "inside = (lower >= self.lower) & (upper <= self.upper)",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "rounding before a slope above a limit",
        "cells/clamp.py",
        "v * (1 - 2 * slack.relative) - 2 * slack.absolute > self.upper",
        "v - 2 * slack.absolute > self.upper",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "underflow before a slope above a limit",
        "cells/clamp.py",
        "v * (1 - 2 * slack.relative) - 2 * slack.absolute > self.upper",
        "v * (1 - 2 * slack.relative) > self.upper",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "rounding before a slope below a limit",
        "cells/clamp.py",
        "v * (1 + 2 * slack.relative) + 2 * slack.absolute < self.upper",
        "v + 2 * slack.absolute < self.upper",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "underflow before a slope below a limit",
        "cells/clamp.py",
        "v * (1 + 2 * slack.relative) + 2 * slack.absolute < self.upper",
        "v * (1 + 2 * slack.relative) < self.upper",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "range of a clamp",
        "cells/clamp.py",
        "self.upper.to(like).expand_as(like)",
        "0.99 * self.upper.to(like).expand_as(like)",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "range of a clamp without a limit",
        "cells/clamp.py",
        "if not all(bool(limit.isfinite().all()) for limit in self.tensors):",
        "if not bool(self.upper.isfinite().all()):",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "concavity of a clamp",
        "cells/clamp.py",
        "((self.lower <= 0) & (self.upper >= 0)).all()",
        "(self.upper >= 0).all()",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "positivity of a clamp",
        "cells/clamp.py",
        "return before and bool((self.upper > 0).all())",
        "return before",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "asymptotic slope of a clamp",
        "cells/clamp.py",
        "return float((self.upper == math.inf).any())",
        "return float((self.upper == math.inf).all())",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "supremum of a clamp",
        "cells/clamp.py",
        "return float(self.upper.max())",
        "return float(self.upper.min())",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "degree of a clamp",
        "cells/clamp.py",
        "return 1.0, _smallest",
        "return 0.99, _smallest",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "least value of a clamp",
        "cells/clamp.py",
        "torch.minimum(self.lower.clamp_min(least), self.upper)",
        "self.lower.clamp_min(least)",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "slopes of computed arguments",
        "cells/elementwise.py",
        "self.slopes(lower - error, upper + error)",
        "self.slopes(lower, upper)",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
    Mutant(
        "rounding passed on by an elementwise step",
        "cells/elementwise.py",
        "passed = steep * error * (1 + 1e-12)",
        "passed = 0.9 * steep * error",
        "tests/cells/test_clamp.py tests/cells/test_steps.py",
    ),
]


def caught(mutant: Mutant) -> str:
    """The first test that failed on the mutant; empty where none did.

    Raises:
        RuntimeError: what is to be mutated does not stand there exactly once, or the tests could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / "perron" / mutant.path
        text = path.read_text()
        if text.count(mutant.old) != 1:
            raise RuntimeError(f"{mutant.bound}: {text.count(mutant.old)} places in {mutant.path} read {mutant.old!r}")
        path.write_text(text.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.bound}: the tests did not run\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    failed = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time (default %(default)s)")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    with ThreadPoolExecutor(arguments.workers) as pool:
        for mutant, test in zip(MUTANTS, pool.map(caught, MUTANTS), strict=True):
            print(f"{'caught by ' + test if test else 'NOT CAUGHT'}: {mutant.bound} ({mutant.path})", flush=True)
            results.append(
                {"bound": mutant.bound, "file": mutant.path, "mutation": mutant.new.strip(), "caught_by": test}
            )
    if arguments.output:
        write_json(arguments.output, results)
    missed = sum(not r["caught_by"] for r in results)
    print(f"{len(results) - missed} of {len(results)} mutants caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
