import pytest
import torch
from torch import nn

from perron.cells import Activate, Chain, Inject, trace
from perron.solvers.aggregation import Aggregation, ChannelAggregation


def chain_of(linear: nn.Module, weight: torch.Tensor) -> Chain:
    with torch.no_grad():
        linear.weight.copy_(weight)
    return trace(nn.Sequential(linear.to(weight.dtype), Inject(), Activate("tanh")))


def dense(weight: torch.Tensor) -> Chain:
    return chain_of(nn.Linear(len(weight), len(weight), bias=False), weight)


def matrix(chain: Chain, value: torch.Tensor) -> torch.Tensor:
    """I - D A of one sample, by its action on the unit vectors."""
    n = value.numel()
    unit = torch.eye(n, dtype=value.dtype).view(n, *value.shape[1:])
    with torch.no_grad():
        image = chain.linear(unit).flatten(1).t()
    return torch.eye(n, dtype=value.dtype) - (1 - value.flatten().square()).unsqueeze(1) * image


def test_rank_one_matrices_are_solved_exactly() -> None:
    rows, columns = torch.rand(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    chain = dense(rows.unsqueeze(1) * columns / 8)
    b = torch.rand(5, 12, dtype=torch.float64)
    model = Aggregation.of(chain, b)
    start = model.start(b)
    torch.testing.assert_close(start, chain(start, b), rtol=1e-6, atol=0)
    value, residual = 0.5 + 0.4 * torch.rand_like(b), torch.randn_like(b)
    found, adjoint = model.correct(value, residual), model.correct_adjoint(1 - value.square(), residual)
    for k in range(len(b)):
        system = matrix(chain, value[k : k + 1])
        torch.testing.assert_close(found[k], torch.linalg.solve(system, residual[k]))
        torch.testing.assert_close(adjoint[k], torch.linalg.solve(system.t(), residual[k]))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_kernels_of_one_channel_pair_are_solved_closely(dims: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 4, 3, padding=1, bias=False)
    r, c = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    taps = torch.rand(*[3] * dims, dtype=torch.float64)
    kernel = torch.einsum("o,i,...->oi...", r, c, taps)
    chain = chain_of(convolution, kernel / kernel.sum((0, *range(2, 2 + dims))).max() * 0.9)
    b = torch.rand(3, 4, *[4] * dims, dtype=torch.float64)
    model = Aggregation.of(chain, b)
    assert isinstance(model, ChannelAggregation)
    value, residual = 0.5 + 0.4 * torch.rand_like(b), torch.randn_like(b)
    found, adjoint = model.correct(value, residual), model.correct_adjoint(1 - value.square(), residual)
    for k in range(len(b)):
        system, flat = matrix(chain, value[k : k + 1]), residual[k].flatten()
        for candidate, operator in ((found[k], system), (adjoint[k], system.t())):
            left = (flat - operator @ candidate.flatten()).norm() / flat.norm()
            assert left < 0.02


def test_what_has_no_model() -> None:
    b = torch.rand(2, 4)
    two = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), Inject(), nn.Tanh())
    assert Aggregation.of(trace(two), b) is None
    assert Aggregation.of(trace(nn.Sequential(nn.Linear(4, 4), Inject(), Activate("erf"))), b) is None
    strided = nn.Sequential(nn.Conv1d(2, 2, 3, stride=2), Inject(), nn.Tanh())
    assert Aggregation.of(trace(strided), torch.rand(1, 2, 9)) is None


def test_zero_weights() -> None:
    chain = dense(torch.zeros(3, 3))
    b = torch.rand(2, 3)
    model = Aggregation.of(chain, b)
    torch.testing.assert_close(model.start(b), torch.tanh(b))
    torch.testing.assert_close(model.correct(b, b), b)
