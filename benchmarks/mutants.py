"""Mutation of the bounds: each is made 1 % too good, one at a time, and some test must fail.

A copy of the package is mutated, and the tests named with the mutant run on it. A mutant that passes them is not caught.

    python benchmarks/mutants.py --output benchmarks/results/mutants.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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
        "enclosure.py",
        "    return m / (1 - m)",
        "    return 0.99 * m / (1 - m)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "the same, as it was",
        "enclosure.py",
        "    return m / (1 - m)",
        "    return 1.01 * m",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "scaling of the lower point",
        "enclosure.py",
        "gain = torch.addcmul(shrink * low_zero, shrink - 1, miss).clamp_min_(0)",
        "gain = torch.addcmul(shrink * low_zero, shrink - 1, 0.99 * miss).clamp_min_(0)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "weight of the chord",
        "enclosure.py",
        "    return 1 / (1 + r), r / (1 + r)",
        "    return 1 - 1.01 * r / (1 + r), 1.01 * r / (1 + r)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "weight of the chord as what is left of 1",
        "enclosure.py",
        "    return 1 / (1 + r), r / (1 + r)",
        "    return 1 / (1 + r), 1 - 1 / (1 + r)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "lower bound",
        "enclosure.py",
        ".mul_(1 - 32 * u)",
        ".mul_(1.01)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "upper bound",
        "enclosure.py",
        "high_q.mul_(1 + grow)).mul_(1 + 32 * u)",
        "high_q.mul_(1 + grow)).mul_(0.99)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "value of f above the upper point",
        "enclosure.py",
        "high_q.mul_(1 + grow)).mul_(1 + 32 * u)",
        "high_q.mul_(1 + 0.9 * grow)).mul_(1 + 32 * u)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "rounding of f",
        "enclosure.py",
        "down, up = (1 - rounding.relative) * (1 - 8 * u), (1 + rounding.relative) * (1 + 8 * u)",
        "down, up = 1, 1",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "relative error bound",
        "enclosure.py",
        "* (1 + 8 * unit_roundoff(lower.dtype))\n    # Without",
        "* 0.99\n    # Without",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "relative error bound of subnormal numbers",
        "enclosure.py",
        "torch.where(gap > 0, gap / lower, gap)",
        "torch.where(gap > 0, gap / lower.clamp_min(2.3e-308), gap)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "rounding outwards",
        "enclosure.py",
        "slack, least = 4 * unit_roundoff(dtype)",
        "slack, least = 0.25 * unit_roundoff(dtype)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "a lower bound beyond the range",
        "enclosure.py",
        ".clamp_(0, most)",
        ".clamp_(0)",
        "tests/test_enclosure.py",
    ),
    Mutant(
        "distance left in the sup norm and in Thompson's metric",
        "contraction.py",
        "    return q / (1 - q) * d",
        "    return 0.99 * q / (1 - q) * d",
        "tests/test_contraction.py",
    ),
    Mutant(
        "underflow in Thompson's metric",
        "contraction.py",
        "share = self.rounding.relative + self.rounding.absolute / least",
        "share = self.rounding.relative + 0 * least",
        "tests/test_contraction.py",
    ),
    Mutant(
        "distance from a strongly monotone cell's fixed point",
        "monotone.py",
        "    return image / m",
        "    return 0.99 * image / m",
        "tests/test_monotone.py",
    ),
    Mutant(
        "error of the adjoint in the weighted norm",
        "solvers/adjoint.py",
        "    return (kappa * residual + spread) / (1 - kappa)",
        "    return 0.99 * (kappa * residual + spread) / (1 - kappa)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "variation of the Jacobian in it",
        "solvers/adjoint.py",
        "    return (kappa * residual + spread) / (1 - kappa)",
        "    return (kappa * residual + 0.99 * spread) / (1 - kappa)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "error of the adjoint of monotone cells",
        "solvers/adjoint.py",
        "    return 1 + norm / m",
        "    return 0.99 * (1 + norm / m)",
        "tests/solvers/test_adjoint.py",
    ),
    Mutant(
        "Euclidean norm of tiny samples",
        "_batch.py",
        "flat / top.clamp_min(torch.finfo(t.dtype).tiny)",
        "flat / top.clamp_min(1)",
        "tests/test_batch.py tests/test_monotone.py",
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
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    missed = sum(not r["caught_by"] for r in results)
    print(f"{len(results) - missed} of {len(results)} mutants caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
