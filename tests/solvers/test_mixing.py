import torch

from perron.cells import trace
from perron.solvers.aggregation import Aggregation
from perron.solvers.mixing import Mixing
from problems import dense_layer


def test_mixing_solves_a_linear_system_in_as_many_steps_as_it_has_dimensions() -> None:
    a = 0.9 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    b = torch.randn(3, 4, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - a, b.t()).t()
    mixing, z = Mixing(4), torch.zeros_like(b)
    for _ in range(6):
        z = mixing(z, z @ a.t() + b - z)
    torch.testing.assert_close(z, exact, rtol=1e-9, atol=1e-9)


def test_samples_do_not_mix() -> None:
    z, d = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    d[:, 2] = torch.nan
    together, alone = Mixing(2), Mixing(2)
    for k in range(2):
        both, one = together(z[k], d[k]), alone(z[k][:2], d[k][:2])
        torch.testing.assert_close(both[:2], one)


def test_aggregation_is_exact_on_rank_one_cells() -> None:
    r, c = torch.rand(7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    layer = dense_layer(torch.outer(r, c) / 4, "tanh")
    chain, b = trace(layer.cell), torch.rand(5, 7, dtype=torch.float64)
    with torch.no_grad():
        model = Aggregation.of(chain, b)
        z = model.start(b)
        torch.testing.assert_close(chain(z, b), z, rtol=1e-4, atol=0)
        value, residual = chain(z, b), torch.randn(5, 7, dtype=torch.float64)
        slope = model.slope(value)
        weight = chain.affine[0].weights[0]
        system = torch.eye(7, dtype=torch.float64) - slope.unsqueeze(2) * weight
        torch.testing.assert_close(
            model.correct(value, residual), torch.linalg.solve(system, residual.unsqueeze(2)).squeeze(2)
        )
        adjoint = torch.eye(7, dtype=torch.float64) - weight.t() * slope.unsqueeze(1)
        torch.testing.assert_close(
            model.correct_adjoint(slope, residual), torch.linalg.solve(adjoint, residual.unsqueeze(2)).squeeze(2)
        )
