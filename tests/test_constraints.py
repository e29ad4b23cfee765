import copy
import pickle

import pytest
import torch
from torch import nn

from perron.constraints import Nonnegative, nonnegative, project_, project_after_step
from perron.nn import PositiveConcaveLinear

OPTIONS = [("square", False), ("square", True), ("projection", False), ("projection", True)]
OPTIMISERS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]


@pytest.mark.parametrize(("method", "normalize"), OPTIONS)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_holds_after_any_step(method, normalize, optimiser) -> None:
    linear = nonnegative(nn.Linear(5, 5), method=method, normalize=normalize)
    opt = optimiser(linear.parameters(), lr=1.0)
    for _ in range(5):
        opt.zero_grad()
        (linear(torch.randn(8, 5)) ** 2).sum().mul(-1).backward()
        opt.step()
        assert Nonnegative.contains(linear.weight.detach()) or not torch.isfinite(linear.weight).all()


@pytest.mark.parametrize(("method", "normalize"), OPTIONS)
def test_assignment_is_inverted(method, normalize) -> None:
    linear = nonnegative(nn.Linear(4, 4), method=method, normalize=normalize)
    wanted = torch.rand(4, 4)
    linear.weight = wanted
    torch.testing.assert_close(linear.weight, wanted)
    zero = torch.zeros(4, 4)
    linear.weight = zero
    assert (linear.weight == 0).all()


def test_negative_assignment_is_refused() -> None:
    linear = nonnegative(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nonnegative"):
        linear.weight = torch.tensor([[1.0, -0.5], [0.0, 0.0]])
    with pytest.raises(ValueError, match="NaN"):
        linear.weight = torch.full((2, 2), torch.nan)


@pytest.mark.parametrize(("method", "normalize"), OPTIONS)
def test_copies_files_and_casts_keep_weight_and_constraint(method, normalize) -> None:
    layer = PositiveConcaveLinear(3, 4, constraint=method, weight_norm=normalize)
    other = PositiveConcaveLinear(3, 4, constraint=method, weight_norm=normalize)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3)
    for twin in (copy.deepcopy(layer), other):
        torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(layer).to(dtype)
        assert cast.weight.dtype == dtype
        assert Nonnegative.contains(cast.weight.detach())
        assert cast.certificate()


def test_pickle_of_the_constraint() -> None:
    twin = pickle.loads(pickle.dumps(Nonnegative("projection", normalize=True)))
    assert (twin.method, twin.normalize) == ("projection", True)


def test_whole_layer_through_torch_save(tmp_path) -> None:
    layer = PositiveConcaveLinear(3, 4)
    layer(torch.randn(2, 3))
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    twin = PositiveConcaveLinear(3, 4)
    twin.load_state_dict(torch.load(tmp_path / "layer.pt"))
    torch.testing.assert_close(twin.weight, layer.weight)


def test_projection_projects_the_raw_weight() -> None:
    linear = nonnegative(nn.Linear(3, 3, bias=False), method="projection")
    opt = torch.optim.SGD(linear.parameters(), lr=10.0)
    handle = project_after_step(opt, linear)
    linear(torch.rand(4, 3)).sum().backward()
    opt.step()
    raw = linear.parametrizations.weight.original
    assert (raw >= 0).all()
    assert (raw == 0).any()
    handle.remove()
    with torch.no_grad():
        raw.fill_(-1)
    assert (linear.weight == 0).all(), "the parametrisation itself must hold without the projection"
    project_(linear)
    assert (raw == 0).all()


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="square"):
        Nonnegative("abs")  # type: ignore[arg-type]
