"""Everything that proves reads modules in one way, and refuses, with its path, what it cannot know."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import perron
from perron import enclose, models
from perron.cells import Activate, Chain, Inject, Opaque, Refusal, as_map, reading, trace
from perron.constraints import nonnegative
from perron.nn import Equilibrium, PositiveConcaveLinear, SubhomogeneousLinear, UnconstrainedLinear
from perron.verify import Interval, certify_classes, propagate


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), PositiveConcaveLinear(4, 4), nn.Linear(4, 2)).eval()


PLACES = {
    "Sequential": lambda net: net,
    "Sequential[0]": lambda net: net[0],
    "Sequential[1]": lambda net: net[1],
    "Sequential[2]": lambda net: net[2],
    "Sequential[2][input]": lambda net: net[2].input,
    "Sequential[2][cell]": lambda net: net[2].cell,
    "Sequential[2][cell][0]": lambda net: net[2].cell[0],
    "Sequential[2][cell][2]": lambda net: net[2].cell[2],
}


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, inputs, output: output + 1)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda _, grad_input, grad_output: None)


def replaced_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments) + 1


def replaced_call(module: nn.Module) -> None:
    call = module._call_impl
    module._call_impl = lambda *arguments: call(*arguments) + 1


def compiled(module: nn.Module) -> None:
    module.compile(backend="eager")


@pytest.mark.parametrize("alter", [hook, pre_hook, backward_hook, replaced_forward, replaced_call, compiled])
@pytest.mark.parametrize("path", PLACES)
def test_altered_modules_are_refused_with_their_path(path: str, alter) -> None:
    net, x = network(), torch.randn(2, 3)
    alter(PLACES[path](net))
    for refused in (lambda: propagate(net, Interval(x, x)), lambda: certify_classes(net, x)):
        with pytest.raises(Refusal) as found:
            refused()
        assert f"{path} " in str(found.value)
    if "2" in path and "input" not in path:
        assert not perron.certify(net)
        assert not perron.certify(net).parts[0][1]
        assert "carries" in perron.certify(net).refusal or "compiled" in perron.certify(net).refusal


class AddsOne(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class SequentialPlusOne(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class BatchNormPlusOne(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class LayerPlusOne(PositiveConcaveLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class LayerOfOtherInjections(PositiveConcaveLinear):
    def positive(self, b: torch.Tensor) -> torch.Tensor:
        return super().positive(b) + 1


class TenTimes(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 10 * x


class Unrectified(nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    "module",
    [
        AddsOne(3, 3),
        SequentialPlusOne(nn.Linear(3, 3)),
        BatchNormPlusOne(3),
        LayerPlusOne(3, 3),
        LayerOfOtherInjections(3, 3),
        TenTimes(),
        Unrectified(),
        models.positive_concave.Network,
    ],
    ids=lambda m: type(m).__name__,
)
def test_subclasses_are_refused(module) -> None:
    if isinstance(module, type):
        module = type("Own", (module,), {})(nn.Linear(3, 3))
    x = torch.randn(2, 3)
    with pytest.raises(Refusal, match=rf"Sequential\[0\] is a {type(module).__name__}, a subclass of"):
        propagate(nn.Sequential(module).eval(), Interval(x, x))


def test_a_subclass_inside_a_layer_is_refused_with_its_whole_path() -> None:
    net, x = network(), torch.randn(2, 3)
    net[2].cell[0] = AddsOne(4, 4)
    with pytest.raises(Refusal, match=r"Sequential\[2\]\[cell\]\[0\] is a AddsOne, a subclass of Linear"):
        propagate(net, Interval(x, x))
    net[2].cell[0] = nn.Linear(4, 4)
    net[2].input = nn.Sequential(AddsOne(4, 4))
    with pytest.raises(Refusal, match=r"is not certified|Sequential\[2\]\[input\]\[0\] is a AddsOne"):
        propagate(net, Interval(x, x))


def test_a_dropout_of_another_forward_is_no_identity() -> None:
    cell = nn.Sequential(nn.Linear(3, 3), TenTimes(), Inject(), nn.Tanh()).eval()
    assert isinstance(as_map(cell)[0], Opaque)
    with pytest.raises(Refusal, match="TenTimes, a subclass of Dropout"):
        trace(cell)


def test_activations_with_other_limits_are_refused() -> None:
    relu6 = nn.ReLU6()
    relu6.max_val = 0.5
    with pytest.raises(Refusal, match=r"ReLU6 from 0.0 to 0.5"):
        trace(nn.Sequential(nonnegative(nn.Linear(3, 3)), Inject(), relu6))
    x = torch.ones(1, 3)
    with pytest.raises(Refusal, match=r"Sequential\[0\] is a ReLU6 from 0.0 to 0.5"):
        propagate(nn.Sequential(relu6), Interval(x, x))


def test_an_empty_place_is_refused() -> None:
    cell = nn.Sequential(nn.Linear(3, 3), Inject(), nn.Tanh())
    cell.register_module("3", None)
    with pytest.raises(Refusal, match="empty place"):
        trace(cell)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("stale", ["pruned", "weight_norm", "spectral_norm"])
def test_weights_made_by_hooks_are_refused(stale: str) -> None:
    """Their `weight` is what the last forward pass left there, and no part of the state."""
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    if stale == "pruned":
        prune.l1_unstructured(linear, "weight", 3)
    else:
        getattr(nn.utils, stale)(linear)
    with pytest.raises(Refusal, match=r"Sequential\[0\] carries hooks.*pruning"):
        propagate(nn.Sequential(linear).eval(), Interval(x, x))
    with pytest.raises(Refusal, match=r"Sequential\[0\] carries hooks"):
        trace(nn.Sequential(linear, Inject(), nn.Tanh()))
    if stale == "pruned":
        prune.remove(linear, "weight")
        box = propagate(nn.Sequential(linear), Interval(x, x))
        assert (box.lower <= linear(x).double() + 1e-6).all()
        assert (linear(x).double() - 1e-6 <= box.upper).all()


@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, parametrizations.spectral_norm, nonnegative])
def test_weights_are_read_through_parametrisations(normalize) -> None:
    linear, x = normalize(nn.Linear(3, 3)).eval(), torch.randn(2, 3)
    with torch.no_grad():
        for raw in linear.parametrizations.weight.parameters():
            raw.mul_(1.7)
    box = propagate(nn.Sequential(linear), Interval(x, x))
    assert (box.lower <= linear(x).double() + 1e-5).all()
    assert (linear(x).double() - 1e-5 <= box.upper).all()
    assert (box.upper - box.lower < 1e-12).all()


def test_weights_that_change_from_read_to_read_are_refused() -> None:
    linear, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3)
    parametrize.register_parametrization(linear, "weight", nn.Dropout(0.5))
    net = nn.Sequential(nn.ReLU(), linear)
    with pytest.raises(Refusal, match=r"weight of Sequential\[1\] is another one at every read"):
        propagate(net, Interval(x, x))
    assert propagate(net.eval(), Interval(x, x)).lower.isfinite().all()
    layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("tanh")).train(), injection="softplus")
    assert "another one at every read" in perron.certify(nn.Sequential(layer)).refusal
    assert "another one at every read" in perron.certify(layer.cell).refusal
    with pytest.raises(Refusal, match="another one at every read"):
        enclose(layer, x.abs(), x.abs() + 0.1)


def test_hooks_on_a_parametrisation_are_refused() -> None:
    linear = nonnegative(nn.Linear(3, 3))
    linear.parametrizations.weight[0].register_forward_hook(lambda _, inputs, output: output)
    with pytest.raises(Refusal, match=r"hooks on its parametrisation of weight"):
        trace(nn.Sequential(linear, Inject(), nn.Tanh()))


def test_only_torchs_own_class_of_a_parametrised_module_is_looked_beneath() -> None:
    linear = nonnegative(nn.Linear(3, 3))
    assert reading.kind(linear, "here") is nn.Linear
    linear.__class__ = type(
        "ParametrizedLinear", (nn.Linear,), {"forward": AddsOne.forward, "weight": torch.ones(3, 3)}
    )
    with pytest.raises(Refusal, match="not torch's own class"):
        reading.kind(linear, "here")


def test_copies_of_parametrised_layers_keep_their_certificates_and_so_do_the_layers() -> None:
    layer = PositiveConcaveLinear(3, 4)
    for twin in (copy.deepcopy(layer), copy.copy(layer)):
        assert layer.certificate()
        assert twin.certificate()


def test_global_hooks_are_refused() -> None:
    net, x = network(), torch.randn(2, 3)
    handle = nn.modules.module.register_module_forward_hook(lambda _, inputs, output: output)
    try:
        with pytest.raises(Refusal, match="global module hooks"):
            propagate(net, Interval(x, x))
        assert "global module hooks" in perron.certify(net).refusal
    finally:
        handle.remove()
    assert propagate(net, Interval(x, x)).lower.isfinite().all()


def test_classes_patched_at_run_time_are_refused(monkeypatch) -> None:
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(lambda self, x: forward(self, x) + 1))
    x = torch.ones(1, 3)
    with pytest.raises(Refusal, match="methods were replaced"):
        propagate(nn.Sequential(nn.Linear(3, 3)), Interval(x, x))


class Product(nn.Module):
    """A parametrisation by a matrix product, which autocast would round."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(width, width) / width)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.abs() @ self.factor

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def test_weights_are_read_without_autocast() -> None:
    linear = nn.Linear(4, 4, bias=False)
    parametrize.register_parametrization(linear, "weight", Product(4))
    layer = Equilibrium(nn.Sequential(linear, Inject(), nn.Tanh())).eval()
    b = torch.rand(2, 4) + 0.1
    exact = layer.solve(b).value
    with torch.autocast("cpu", torch.bfloat16):
        found, box = enclose(layer, exact, b), propagate(layer, Interval(b, b))
        assert layer.certificate()
        assert perron.certify(layer.cell)
    assert found.proven.all()
    for low, high in ((found.lower, found.upper), (box.lower, box.upper)):
        assert ((low <= exact * (1 + 1e-4)) & (exact * (1 - 1e-4) <= high)).all()


def test_methods_exchanged_inside_of_one_file_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(nn.Tanh, "forward", nn.ReLU.forward)
    x = torch.full((1, 3), 5.0)
    with pytest.raises(Refusal, match="methods were replaced"):
        propagate(nn.Sequential(nn.Tanh()), Interval(x, x))


def test_a_second_base_beside_a_known_class_is_looked_at() -> None:
    class Calls(nn.Module):
        def _call_impl(self, x):
            return 100 * x

        __call__ = _call_impl

    class Both(nn.Linear, Calls):
        pass

    module = Both(1, 1)
    module.parametrizations = nn.ModuleDict({"weight": nn.Identity()})
    assert float(module(torch.ones(1, 1))) == 100
    with pytest.raises(Refusal, match="not torch's own class"):
        reading.kind(module, "here")


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_scripted_modules_are_refused() -> None:
    x = torch.ones(1, 3)
    scripted = torch.jit.trace(nn.Linear(3, 3), x)
    for module in (torch.compile(nn.Linear(3, 3), backend="eager"), scripted):
        for altered in (module, nn.Sequential(nn.ReLU(), module)):
            with pytest.raises(Refusal):
                propagate(altered, Interval(x, x))
        assert isinstance(as_map(nn.Sequential(module, Inject(), nn.Tanh()))[0], Opaque)


def test_the_librarys_own_networks_are_read() -> None:
    network = models.positive_concave.Network
    known = [cls for cls in vars(models).values() if isinstance(cls, type) and issubclass(cls, network)]
    assert len(known) == 6
    assert {*known, network} < reading.CONTAINERS
    for cls in reading.CONTAINERS:
        assert cls.forward is nn.Sequential.forward
        assert cls.__iter__ is nn.Sequential.__iter__


def test_every_layer_is_known_and_read_unaltered() -> None:
    known = {
        cls for cls in vars(perron.nn).values() if isinstance(cls, type) and callable(getattr(cls, "certificate", None))
    }
    assert known == reading.LAYERS
    for layer in (PositiveConcaveLinear(2, 2), UnconstrainedLinear(2, 2), SubhomogeneousLinear(2, 2, normalize=2.0)):
        layer(torch.randn(3, 2)).sum().backward()
        assert reading.is_layer(layer)
        assert isinstance(as_map(layer.cell)[0], Chain)


def test_certificates_of_strangers_are_refused() -> None:
    class Stranger(nn.Module):
        def certificate(self):
            return perron.certify(PositiveConcaveLinear(2, 2))

    assert "Stranger" in perron.certify(Stranger()).refusal
    assert "Sequential[1] is a Stranger" in perron.certify(nn.Sequential(nn.ReLU(), Stranger())).refusal
    assert "LayerPlusOne, a subclass of PositiveConcaveLinear" in perron.certify(LayerPlusOne(2, 2)).refusal


def test_injections_of_a_subclass_are_checked() -> None:
    """z = relu(z/2 + b) has the fixed point 0 for b = -1; proofs for b >= 0 say nothing of it."""

    class Negative(Equilibrium):
        def positive(self, b: torch.Tensor) -> torch.Tensor:
            return -b

    cell = nn.Sequential(nonnegative(nn.Linear(1, 1, bias=False)), Inject(), Activate("sigmoid"))
    with pytest.raises(ValueError, match="injection must be nonnegative"):
        Negative(cell, injection="relu").solve(torch.ones(2, 1))
    assert Negative(cell, injection="relu").solve(-torch.ones(2, 1)).certified


def test_training_mode_anywhere_is_refused() -> None:
    net = network()
    net[2].cell[0].train()
    with pytest.raises(Refusal, match=r"Sequential\[2\]\[cell\]\[0\] is in training mode"):
        certify_classes(net, torch.randn(2, 3))
