import warnings

import pytest
import torch

from perron.infinite_width import MatchWarning, UnstableError, explicit_coefficients, match_explicit, solve_state
from perron.infinite_width.coefficients import ck_coefficients


def numbers(match, layer: int = 0) -> list[float]:
    return [float(t) for t in match.activations[layer].name.split("(")[1].rstrip(")").split(",")]


def test_hard_tanh_has_the_reference_values() -> None:
    for target, trained, wanted in (
        ("ck", "Av", [0.7459380831, 1.2069133418]),
        ("ntk", "Av", [0.5085167362, 1.4626418828]),
        ("ntk", "ABv", [0.7617495411, 1.2344179420]),
    ):
        match = match_explicit("tanh", 0.3, 0.7, target=target, trained=trained)
        assert numbers(match) == pytest.approx(wanted, abs=5e-9)
        assert float(match.residuals.abs().max()) < 1e-12


@pytest.mark.parametrize("sa", [0.1, 0.2, 0.3])
@pytest.mark.parametrize("name", ["tanh", "erf", "relu", "leaky_relu(0.2)"])
@pytest.mark.parametrize("tau0", [1.0, 0.6])
def test_closed_forms_solve_all_four_equations(sa: float, name: str, tau0: float) -> None:
    match = match_explicit(name, sa, 1 - sa, tau0)
    assert len(match.activations) == (1 if name in ("tanh", "erf") else 2)
    assert float(match.residuals.abs().max()) < 1e-12
    again = explicit_coefficients(match.activations, tau0)[0].as_tensor()
    wanted = ck_coefficients(solve_state(name, sa, 1 - sa, tau0)).as_tensor()
    torch.testing.assert_close(again, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tau0", [1.0, 0.7])
def test_hard_tanh_matches_tangent_kernels_of_other_norms(tau0: float) -> None:
    for trained in ("Av", "ABv"):
        match = match_explicit("erf", 0.2, 0.8, tau0, target="ntk", trained=trained)
        assert float(match.residuals.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swish", {}),
        ("gelu", {}),
        ("softplus", {}),
        ("relu", {"target": "ntk", "trained": "ABv"}),
        ("relu", {"target": "ntk", "trained": "Av"}),
    ],
)
def test_the_search_solves_all_four_equations(name: str, options: dict[str, str]) -> None:
    match = match_explicit(name, 0.3, 0.7, **options)
    assert float(match.residuals.abs().max()) < 1e-9
    assert all(isinstance(n, float) for layer in match.activations for n in layer.kinks)


def test_what_does_not_fit_is_told_with_numbers() -> None:
    with pytest.warns(MatchWarning, match=r"hard_tanh do not reproduce the ck of relu.*relative residuals"):
        match = match_explicit("relu", 0.3, 0.7, family="hard_tanh")
    assert float(match.residuals.abs().max()) > 1e-3
    with pytest.warns(MatchWarning, match="try another depth"):
        match_explicit("relu", 0.95, 0.05, family="leaky_relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        match_explicit("relu", 0.3, 0.7)


def test_misuse() -> None:
    for options in ({"target": "nngp"}, {"family": "gelu"}, {"depth": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            match_explicit("tanh", 0.3, 0.7, **options)
    with pytest.raises(UnstableError):
        match_explicit("relu", 3.0, 0.7)
