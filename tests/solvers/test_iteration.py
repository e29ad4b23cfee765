import torch

from perron.solvers.aggregation import Mixed
from perron.solvers.iteration import Found, Method, Rule, iterate
from perron.solvers.mixing import Mixing
from problems import UNRULY


class Elementwise:
    """A map that acts on every sample in the same way."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        return self.function(z)

    def select(self, index: torch.Tensor):
        return self


def run(function, start: torch.Tensor, limit: int = 60, method: Method | None = None) -> Found:
    rule = Rule(tol=1e-8, slack=None, ahead=False, limit=limit)
    return iterate(Elementwise(function), method or Mixed(None, Mixing(5)), start, rule)


def test_points_outside_of_the_domain_are_taken_back_per_sample() -> None:
    """Next to a sample that never was in it, and as if alone."""
    start = torch.tensor([[1.001], [1.01], [0.5], [1.2]], dtype=torch.float64)
    function = UNRULY["logarithms"][0]
    found = run(function, start)
    good = [0, 1, 3]
    assert (found.measure[good] <= 1e-8).all()
    torch.testing.assert_close(found.value[good], torch.full((3, 1), 1.3).double(), rtol=1e-4, atol=0)
    assert found.measure[2].isnan()
    for k in good:
        torch.testing.assert_close(run(function, start[k : k + 1]).value[0], found.value[k], rtol=1e-7, atol=0)


def test_the_last_accepted_point_is_what_is_returned() -> None:
    """However the last step ends, also outside of the domain."""
    function = UNRULY["logarithms"][0]
    for limit in range(1, 12):
        found = run(function, torch.full((1, 1), 1.001, dtype=torch.float64), limit)
        assert found.steps == limit or found.measure <= 1e-8
        assert found.value.isfinite().all()
        torch.testing.assert_close(found.value, function(found.z))


def test_half_of_the_way_back() -> None:
    """A method that always proposes 8: f is only defined below 1.5."""

    class Far:
        products, trust = 0, 10.0

        def advance(self, z, fz, room):
            return torch.full_like(z, 8.0)

        def select(self, index):
            return self

    seen = []

    def function(z):
        seen.append(float(z))
        return torch.where(z < 1.5, 0.5 * z + 0.2, torch.nan)

    run(function, torch.zeros(1, 1), 5, Far())
    assert seen == [0.0, 8.0, 4.0, 2.0, 1.0]


def test_a_goal_that_has_underflowed_is_no_error() -> None:
    rule = Rule(tol=0.0, slack=None, ahead=False, limit=300)
    found = iterate(Elementwise(lambda z: 0.5 * z + 1), Mixed(None, Mixing(5)), torch.tensor([[0.3]]), rule)
    torch.testing.assert_close(found.value, torch.tensor([[2.0]]))
