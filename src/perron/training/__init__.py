"""Training on Lightning: module, callbacks, presets. Needs perron[train]."""

from perron.training.callbacks import History
from perron.training.module import Classifier, equilibrium_layers

__all__ = ["Classifier", "History", "equilibrium_layers"]
