import math

import pytest

from perron.report.tables import at_least, at_most, said_versions


@pytest.mark.parametrize(
    ("bound", "form", "text"),
    [
        (1.4e-4, ".0e", "2e-04"),
        (1e-4, ".0e", "1e-04"),
        (0.5, ".0e", "5e-01"),
        (9.96e-5, ".1e", "1.0e-04"),
        (9.994, ".2f", "10.00"),
        (0.9994, ".3f", "1.000"),
        (0.25, ".3f", "0.250"),
        (-1.26, ".1f", "-1.2"),
        (0.0, ".2e", "0.00e+00"),
        (math.inf, ".0e", "inf"),
        (math.nan, ".0e", "nan"),
    ],
)
def test_an_upper_bound_is_never_shown_below_itself(bound: float, form: str, text: str) -> None:
    assert at_most(bound, form) == text
    assert not float(text) < bound


@pytest.mark.parametrize(
    ("bound", "form", "text"),
    [
        (99.9, ".0f", "99"),
        (100.0, ".0f", "100"),
        (-1.21, ".1f", "-1.3"),
        (0.0, ".1f", "0.0"),
        (-math.inf, ".4f", "-inf"),
    ],
)
def test_a_lower_bound_is_never_shown_above_itself(bound: float, form: str, text: str) -> None:
    assert at_least(bound, form) == text
    assert math.isnan(float(at_least(math.nan, ".4f")))


def test_all_versions_are_said() -> None:
    rows = [{"versions": {"perron": v}} for v in ("1", "2", "1")]
    assert said_versions(rows) == "perron 1; perron 2"
    assert said_versions([*rows, {}]) == "perron 1; perron 2; versions that were not recorded"
