"""Gaussian and Student-t processes on the kernel of an equilibrium network: held-out likelihood, and inputs from elsewhere.

Noise, scale and prior are chosen by the evidence of the training data. Classification: digits, one-hot labels as outputs; the
foreign inputs are digits upside down and images of uniform noise. Regression: the diabetes data of scikit-learn (442
patients, 10 features; progression of the disease after a year), a fifth held out, several splits; the foreign inputs are
random directions.

    python benchmarks/process.py --output benchmarks/results/process.json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from torch import Tensor

from perron._files import write_json
from perron.data import Digits
from perron.infinite_width import Process, implicit_ck
from perron.infinite_width.readout import normalised

NOISES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0, 10.0)
PRIORS = [(a, r * a) for a, r in itertools.product((0.5, 2.0, 8.0), (0.03, 0.1, 0.3, 1.0, 3.0))]
SCALES = tuple(0.01 * 1.5**k for k in range(16))
PROCESSES = ("Gaussian", "Gaussian, scale chosen", "Student-t")


def best(name: str, kernel: Tensor, targets: Tensor) -> tuple[Process, float]:
    """The process with the largest evidence, and the scale by which its kernel is to be multiplied."""
    candidates = [
        (Process(c * kernel, targets, noise=c * s, **({} if p is None else {"shape": p[0], "rate": p[1]})), c)
        for s, c, p in itertools.product(
            NOISES,
            SCALES if name == "Gaussian, scale chosen" else (1.0,),
            PRIORS if name == "Student-t" else (None,),
        )
    ]
    return max(candidates, key=lambda candidate: float(candidate[0].log_evidence().sum()))


def table(rows: list[dict[str, Any]]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def classification(activation: str) -> list[dict[str, Any]]:
    data = Digits()
    data.setup("fit")
    data.setup("test")
    (train, y), (test, y_test) = (data.splits[s].tensors for s in ("train", "test"))
    mean = train.flatten(1).double().mean(0)
    noise = torch.randn(test.shape, generator=torch.Generator().manual_seed(0))
    parts = {"test": test, "upside down": test.flip(2), "noise": noise}
    kernel = implicit_ck(torch.cat([normalised(t, mean) for t in (train, *parts.values())]), activation, 0.3, 0.7)
    n, count = len(train), len(test)
    targets = F.one_hot(y, 10).double() - 0.1
    rows = []
    for name in PROCESSES:
        process, c = best(name, kernel[:n, :n], targets)
        found, entropy = {}, {}
        for number, part in enumerate(parts):
            where = slice(n + number * count, n + (number + 1) * count)
            found[part] = process.predict(c * kernel[where, :n], c * kernel.diagonal()[where])
            p = found[part].probabilities().clamp_min(1e-300)
            entropy[f"entropy, {part}"] = float(-(p * p.log()).sum(1).mean())
        chosen = found["test"].probabilities()[torch.arange(count), y_test]
        rows.append(
            {
                "process": name,
                "noise": f"{process.noise / c:g}",
                "prior": f"scale {c:g}" if process.shape is None else f"{process.shape:g}, {process.rate:g}",
                "evidence": float(process.log_evidence().sum()),
                "accuracy": float((found["test"].mean.argmax(1) == y_test).double().mean()),
                "log density": float(found["test"].log_density(F.one_hot(y_test, 10).double() - 0.1).sum(1).mean()),
                "log loss": float(-chosen.clamp_min(1e-300).log().mean()),
                **entropy,
                **{f"deviation, {part}": float(p.variance.sqrt().mean()) for part, p in found.items()},
            }
        )
    return rows


def regression(activation: str, splits: int = 5) -> list[dict[str, Any]]:
    features, progression = load_diabetes(return_X_y=True)
    x, y = torch.from_numpy(features), torch.from_numpy(progression)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in PROCESSES}
    for seed in range(splits):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        n = len(x) * 4 // 5
        train, test = order[:n], order[n:]
        foreign = torch.randn(200, x.shape[1], generator=generator, dtype=torch.float64)
        scaled = (x - x[train].mean(0)) / x[train].std(0)
        # The constant keeps a trace of norms, which unit rows would lose.
        parts = torch.cat([scaled[train], scaled[test], foreign])
        inputs = F.normalize(torch.cat([parts, torch.full((len(parts), 1), x.shape[1] ** 0.5)], 1))
        targets = (y - y[train].mean()) / y[train].std()
        kernel = implicit_ck(inputs, activation, 0.3, 0.7)
        held, other = slice(n, len(x)), slice(len(x), None)
        for name in PROCESSES:
            process, c = best(name, kernel[:n, :n], targets[train])
            found = process.predict(c * kernel[held, :n], c * kernel.diagonal()[held])
            away = process.predict(c * kernel[other, :n], c * kernel.diagonal()[other])
            new = targets[test][:, None]
            rows[name].append(
                {
                    "evidence": float(process.log_evidence().sum()),
                    "root mean square error": float((found.mean - new).square().mean().sqrt()),
                    "log density": float(found.log_density(new).mean()),
                    "deviation, test": float(found.variance.sqrt().mean()),
                    "deviation, random directions": float(away.variance.sqrt().mean()),
                }
            )
    return [
        {"process": name, **{key: statistics.mean(row[key] for row in found) for key in found[0]}}
        for name, found in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {"classification": classification(options.activation), "regression": regression(options.activation)}
    for rows in results.values():
        table(rows)
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
