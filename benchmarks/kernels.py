"""How near kernels of infinitely wide equilibrium networks are to their structured form and to matched explicit networks.

First table: operator norm of the difference on Gaussian mixtures of three classes in p dimensions (covariances identity,
identity times 1 + 2/sqrt(p), AR(0.5); the second has a mean of norm 5 before all is divided by sqrt(p)), n = p, one draw, and
the power of p that fits it: with what the theory knows of the classes, then without labels and with a diagonal and a1 that
follow the norms. Second: relative operator norm of the difference to the kernel of the matched explicit network, and of the
unmatched one (the same function, one layer, its diagonal matched), on a mixture and, with --data-dir, on MNIST images,
centered and with unit norm. Third: seconds and memory for many samples.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perron._files import write_json
from perron.infinite_width import (
    GaussianMixture,
    MixtureSample,
    ck_coefficients,
    explicit_ck,
    implicit_kernels,
    match_explicit,
    ntk_coefficients,
    spectral_equivalent,
)

SA, SB = 0.3, 0.7
ACTIVATIONS = ("relu", "leaky_relu(0.2)", "swish", "tanh", "hard_tanh")


def mixture(p: int, seed: int = 0) -> MixtureSample:
    place = torch.arange(p, dtype=torch.float64)
    means = torch.zeros(3, p)
    means[1, 0] = 5
    covariances = [
        torch.eye(p, dtype=torch.float64),
        (1 + 2 / math.sqrt(p)) * torch.eye(p, dtype=torch.float64),
        0.5 ** (place[:, None] - place).abs(),
    ]
    counts = [p // 3, p // 3, p - 2 * (p // 3)]
    return GaussianMixture(means, covariances).sample(counts, generator=torch.Generator().manual_seed(seed))


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh((matrix + matrix.t()) / 2).abs().max())


def convergence(dimensions: list[int]) -> dict[str, dict[str, list[float]]]:
    table: dict[str, dict[str, list[float]]] = {}
    for p in dimensions:
        sample = mixture(p)
        for name in ACTIVATIONS:
            found = implicit_kernels(sample.X, name, SA, SB)
            state = found.state
            rows = {
                "CK": (found.ck, ck_coefficients(state)),
                "NTK Av": (found.ntk("Av"), ntk_coefficients(state, "Av")),
                "NTK ABv": (found.ntk("ABv"), ntk_coefficients(state, "ABv")),
            }
            for kind, (kernel, coefficients) in rows.items():
                plain = spectral_equivalent(coefficients, sample.X, sample=sample)
                refined = spectral_equivalent(coefficients, sample.X, refined=True)
                row = table.setdefault(f"{name} {kind}", {"norm": [], "difference": [], "refined": []})
                row["norm"].append(norm(kernel))
                row["difference"].append(norm(kernel - plain))
                row["refined"].append(norm(kernel - refined))
    for row in table.values():
        row["power"] = [np.polyfit(np.log(dimensions), np.log(row[key]), 1)[0] for key in ("difference", "refined")]
    return table


def distances(X: Tensor, name: str, sa: float) -> dict[str, float]:
    wanted = implicit_kernels(X, name, sa, 1 - sa).ck
    match = match_explicit(name, sa, 1 - sa, float(X.square().sum(1).mean().sqrt()))
    plain = explicit_ck(X, [name])
    plain = plain * (wanted.diagonal().mean() / plain.diagonal().mean())
    size = norm(wanted)
    return {
        "largest residual": float(match.residuals.abs().max()),
        "matched": norm(explicit_ck(X, match.activations) - wanted) / size,
        "unmatched": norm(plain - wanted) / size,
    }


def large(count: int) -> list[dict[str, Any]]:
    """Conjugate kernels of so many random inputs in 784 dimensions; the memory is the process's largest so far."""
    X = F.normalize(torch.randn(count, 784, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    rows = []
    for name in ("relu", "tanh"):
        start = time.perf_counter()
        found = implicit_kernels(X, name, SA, SB)
        rows.append(
            {
                "activation": name,
                "samples": count,
                "seconds": time.perf_counter() - start,
                "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "steps": found.steps,
                "residual": found.residual,
            }
        )
    return rows


def mnist(folder: str, count: int) -> Tensor:
    from perron.data.sources import read_mnist

    images, _ = read_mnist(Path(folder), "train")
    x = torch.from_numpy(images[:count]).double().flatten(1)
    return F.normalize(x - x.mean(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", default="200,400,800,1500")
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=5000, help="of the third table")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dimensions = [int(p) for p in options.dimensions.split(",")]
    table = convergence(dimensions)
    print(f"| kernel | {' | '.join(f'p = {p}' for p in dimensions)} | power | norm at the last |")
    print("|" + "---|" * (len(dimensions) + 3))
    for name, row in table.items():
        cells = " | ".join(f"{d:.3f}, {r:.4f}" for d, r in zip(row["difference"], row["refined"], strict=True))
        powers = ", ".join(f"{p:.2f}" for p in row["power"])
        print(f"| {name} | {cells} | {powers} | {row['norm'][-1]:.2f} |", flush=True)
    data = {"mixture": F.normalize(mixture(800).X)}
    if options.data_dir:
        data["MNIST"] = mnist(options.data_dir, options.images)
    print("\n| data | activation | sa | largest residual | matched | unmatched |\n|" + "---|" * 6)
    matches = []
    for where, X in data.items():
        for name in ("tanh", "relu"):
            for sa in (0.1, 0.2, 0.3):
                row = {"data": where, "activation": name, "sa": sa, **distances(X, name, sa)}
                matches.append(row)
                print(
                    f"| {where} | {name} | {sa} | {row['largest residual']:.0e} | {row['matched']:.5f} | "
                    f"{row['unmatched']:.5f} |",
                    flush=True,
                )
    rows = large(options.samples)
    print("\n| activation | samples | seconds | GiB | steps | residual |\n|" + "---|" * 6)
    for row in rows:
        print(
            f"| {row['activation']} | {row['samples']:,} | {row['seconds']:.1f} | {row['GiB']:.1f} | {row['steps']} | "
            f"{row['residual']:.0e} |"
        )
    if options.output:
        found = {"dimensions": dimensions, "convergence": table, "matches": matches, "large": rows}
        write_json(options.output, found)


if __name__ == "__main__":
    main()
