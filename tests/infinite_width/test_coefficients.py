import pytest
import torch

from perron.infinite_width import ck_coefficients, explicit_coefficients, ntk_coefficients, solve_state, two_slopes

CLOSE = {"rtol": 0, "atol": 6e-11}


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_reference_values_of_relu() -> None:
    state = solve_state("relu", 0.3, 0.7, 1.0)
    found = (
        ck_coefficients(state).as_tensor(),
        ntk_coefficients(state).as_tensor(),
        ntk_coefficients(state, "ABv").as_tensor(),
    )
    torch.testing.assert_close(found[0], numbers(0.1891891892, 0.0335399751, 0.0631853929, 0.2657671674), **CLOSE)
    torch.testing.assert_close(found[1], numbers(0.2045288532, 0.0362594325, 0.0785548128, 0.3126672558), **CLOSE)
    torch.testing.assert_close(found[2], numbers(0.3937180424, 0.0362594325, 0.2049255985, 0.7244319617), **CLOSE)
    matched = [two_slopes(1.3095160525, 0.0095121294), two_slopes(0.8735786722, 0.4454495098)]
    torch.testing.assert_close(explicit_coefficients(matched, 1.0)[0].as_tensor(), found[0], rtol=0, atol=1e-9)
    second = [two_slopes(0.8588846336, 0.4601435483), two_slopes(1.3156068721, 0.0034213099)]
    torch.testing.assert_close(explicit_coefficients(second, 1.0)[0].as_tensor(), found[0], rtol=0, atol=1e-9)


def test_reference_values_of_tanh() -> None:
    found = ck_coefficients(solve_state("tanh", 0.3, 0.7, 1.0)).as_tensor()
    torch.testing.assert_close(found, numbers(0.3320789183, 0.0, 0.0, 0.3555669123), **CLOSE)


def test_one_layer_is_an_equilibrium_without_feedback() -> None:
    for name in ("relu", "tanh", "swish"):
        state = solve_state(name, 0.0, 1.0, 1.3)
        ck, ntk = explicit_coefficients([name], 1.3)
        torch.testing.assert_close(ck_coefficients(state).as_tensor(), ck.as_tensor())
        torch.testing.assert_close(ntk_coefficients(state, "ABv").as_tensor(), ntk.as_tensor())
        frozen = explicit_coefficients([name], 1.3, train_input=False)[1]
        torch.testing.assert_close(ntk_coefficients(state, "Av").as_tensor(), frozen.as_tensor())


def test_misuse() -> None:
    with pytest.raises(ValueError, match="Av"):
        ntk_coefficients(solve_state("relu", 0.3, 0.7, 1.0), "A")
