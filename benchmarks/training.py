"""Seconds per epoch of `perron fit mnist-linear`'s network: Perron, Perron compiled, and the common hook recipe.

Same network, initial weights, optimiser, schedule, batches and Lightning set-up for all, one thread, one after the other
in one run; the first epoch of the compiled layer includes compiling. The hook gets the loosest relative residual at
which its true entrywise error is at most 1e-4 on a batch of the network that Perron has trained before it, and the
backward tolerance likewise (see speed.py). Perron proves every enclosure while it trains; the hook proves nothing.

    python benchmarks/training.py --data-dir DIR --output benchmarks/results/training.json
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from baselines import Cell, hook
from speed import TARGET, Baseline, Case, Perron, _accelerated, _neumann
from torch import Tensor, nn

from perron._files import write_json
from perron.data import MNIST, Digits, ImageData
from perron.models import PositiveConcaveLinearNet
from perron.nn import PositiveConcaveLinear
from perron.solvers import Auto, Compiled
from perron.training import Classifier


class Hooked(nn.Module):
    """The layer with its solve replaced by the hook recipe."""

    def __init__(self, layer: PositiveConcaveLinear, tol: float, backward_tol: float) -> None:
        super().__init__()
        self.inner, self.tol, self.backward_tol = layer, tol, backward_tol

    def forward(self, x: Tensor) -> Tensor:
        return hook(Cell(self.inner.weight), self.inner.injected(x), self.tol, self.backward_tol)


class _Clock(L.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of the training batches alone, without validation.
        self.seconds.append(self.last - self.begin)


def network(data: ImageData) -> PositiveConcaveLinearNet:
    torch.manual_seed(0)
    return PositiveConcaveLinearNet(math.prod(data.image_shape), len(data.classes), width=80)


def train(model: nn.Module, data: ImageData, epochs: int) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    clock = _Clock()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock],
        num_sanity_val_steps=0,
    )
    module = Classifier(model, classes=len(data.classes))
    trainer.fit(module, data)
    metrics = {
        k: float(v) for k, v in trainer.callback_metrics.items() if k.endswith(("val_acc", "steps_epoch", "bound"))
    }
    return {"seconds": clock.seconds, **metrics}


def calibrated(model: PositiveConcaveLinearNet, x: Tensor) -> tuple[float, float]:
    """The hook's tolerances on a batch that goes through a trained network."""
    layer = model[3]
    assert isinstance(layer, PositiveConcaveLinear)
    with torch.no_grad():
        b, weight = layer.injected(model.eval()[:3](x)), layer.weight.detach()
        w64, b64 = weight.double(), b.double()
        value = _accelerated(lambda z: torch.tanh(z @ w64.t() + b64), torch.tanh(b64))
        v = torch.randn_like(b)
        slope = 1 - value.square()
        gradient = slope * _neumann(lambda g: (slope * g) @ w64, v.double())
    case = Case("trained", weight, b, v, value, gradient, 0)
    goal = max(2 * Perron(case, Auto()).check()["gradient_error"], TARGET)
    baseline = Baseline(case, "hook")
    assert baseline.calibrate(goal, 60), "the hook cannot reach the target"
    return baseline.tol, baseline.backward_tol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="of MNIST; without it the digits of scikit-learn")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = MNIST(data_dir=arguments.data_dir, batch_size=64) if arguments.data_dir else Digits(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    results: dict[str, Any] = {}
    trained: PositiveConcaveLinearNet | None = None
    for name, solver in (("Auto", Auto()), ("Compiled", Compiled())):
        model = network(data)
        model[3].solver = replace(solver, tol=TARGET)
        results[name] = train(model, data, arguments.epochs)
        trained = model
        print(name, results[name], flush=True)
    assert trained is not None
    x, _ = next(iter(data.train_dataloader()))
    tol, backward_tol = calibrated(trained, x)
    model = network(data)
    model[3] = Hooked(model[3], tol, backward_tol)
    results["hook"] = {**train(model, data, arguments.epochs), "tol": tol, "backward_tol": backward_tol}
    print("hook", results["hook"], flush=True)
    fastest = {name: min(r["seconds"]) for name, r in results.items()}
    for name in ("Auto", "Compiled"):
        print(f"hook/{name}: {fastest['hook'] / fastest[name]:.2f}x")
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
