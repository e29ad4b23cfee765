import math

import pytest
import torch

from perron._numerics.batch import euclidean


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-200, 1e-160, 1.0, 1e160, 1e300])
def test_norms_neither_underflow_nor_overflow(scale: float) -> None:
    t = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64) * scale
    assert euclidean(t).tolist() == pytest.approx([5 * scale, 0.0], rel=1e-14, abs=5e-324)


def test_norms_of_what_is_not_finite_are_not_either() -> None:
    t = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, -math.inf], [1.0, 1.0]])
    assert euclidean(t).isfinite().tolist() == [False, False, False, True]
    assert euclidean(torch.ones(2, 0)).tolist() == [0, 0]
