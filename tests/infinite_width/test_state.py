import pytest
import torch

from perron.infinite_width.state import UnstableError, solve_state


def test_reference_values() -> None:
    relu, tanh = solve_state("relu", 0.3, 0.7, 1.0), solve_state("tanh", 0.3, 0.7, 1.0)
    assert float(relu.tau2) == pytest.approx(0.7797301502, abs=5e-11)
    assert float(relu.shift) == pytest.approx(0.3522753294, abs=5e-11)
    assert float(tanh.tau2) == pytest.approx(0.8066700737, abs=5e-11)


def test_derivative_of_the_state() -> None:
    sa = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for name in ("tanh", "relu", "swish"):
        (slope,) = torch.autograd.grad(solve_state(name, sa, 0.7, 1.2).tau2, sa)
        ends = [float(solve_state(name, 0.3 + h, 0.7, 1.2).tau2) for h in (1e-6, -1e-6)]
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-7)


def test_unstable_networks_are_refused() -> None:
    # tau is finite there, and the network does not converge all the same.
    with pytest.raises(UnstableError, match="below 1"):
        solve_state("relu", 2.5, 0.7, 1.0)
    with pytest.raises(UnstableError, match="no finite"):
        solve_state("relu", 3.5, 0.7, 1.0)
    with pytest.raises(UnstableError, match="sa"):
        solve_state("linear", 1.0, 0.7, 1.0)
    for wrong in ((-0.1, 0.7, 1.0), (0.3, 0.0, 1.0), (0.3, 0.7, 0.0), (float("nan"), 0.7, 1.0)):
        with pytest.raises(ValueError, match="sb and tau0"):
            solve_state("tanh", *wrong)
