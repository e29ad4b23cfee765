"""Gaussian and Student-t processes on the kernel of an equilibrium network: held-out likelihood, and inputs from elsewhere.

Digits, one-hot labels as outputs; noise and prior are chosen by the evidence of the training data. The foreign inputs are
images of uniform noise, and digits upside down.

    python benchmarks/process.py --output benchmarks/results/process.json
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from perron.data import Digits
from perron.kernels import Process, implicit_ck
from perron.kernels.readout import normalised

NOISES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PRIORS = [(a, r * a) for a, r in itertools.product((0.5, 2.0, 8.0), (0.03, 0.1, 0.3, 1.0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    data = Digits()
    data.setup("fit")
    data.setup("test")
    (train, y), (test, y_test) = (data.splits[s].tensors for s in ("train", "test"))
    mean = train.flatten(1).double().mean(0)
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    parts = {"test": test, "upside down": test.flip(2), "noise": noise}
    kernel = implicit_ck(
        torch.cat([normalised(t, mean) for t in (train, *parts.values())]), options.activation, 0.3, 0.7
    )
    n, count = len(train), len(test)
    targets = F.one_hot(y, 10).double() - 0.1
    rows = []
    print(
        "| process | noise | prior | evidence | test accuracy | held-out log density | standard deviation: test | "
        "upside down | noise |\n|" + "---|" * 9
    )
    for name, priors in (("Gaussian", [None]), ("Student-t", PRIORS)):
        candidates = [
            Process(kernel[:n, :n], targets, noise=s, **({} if p is None else {"shape": p[0], "rate": p[1]}))
            for s, p in itertools.product(NOISES, priors)
        ]
        best = max(candidates, key=lambda process: float(process.log_evidence().sum()))
        found = {}
        for number, part in enumerate(parts):
            where = slice(n + number * count, n + (number + 1) * count)
            found[part] = best.predict(kernel[where, :n], kernel.diagonal()[where])
        row = {
            "process": name,
            "noise": best.noise,
            "prior": None if best.shape is None else [best.shape, best.rate],
            "evidence": float(best.log_evidence().sum()),
            "accuracy": float((found["test"].mean.argmax(1) == y_test).double().mean()),
            "log density": float(found["test"].log_density(F.one_hot(y_test, 10).double() - 0.1).sum(1).mean()),
            **{f"deviation, {part}": float(p.variance.sqrt().mean()) for part, p in found.items()},
        }
        rows.append(row)
        print(
            f"| {name} | {row['noise']:g} | {row['prior']} | {row['evidence']:.0f} | {row['accuracy']:.2%} | "
            f"{row['log density']:.2f} | " + " | ".join(f"{row[f'deviation, {part}']:.3f}" for part in parts) + " |"
        )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
