from dataclasses import replace

import torch

from perron.nn import PositiveConcaveLinear
from perron.training.module import certified_errors


def test_only_what_is_proven_counts_as_certified() -> None:
    layer = PositiveConcaveLinear(4, 4)
    layer(torch.randn(3, 4))
    solution = layer.last_solution
    assert solution is not None
    assert certified_errors(solution).isfinite().all()
    estimate = replace(solution, proof_dtype=None)
    assert estimate.error_bound.isfinite().all()
    assert certified_errors(estimate).isinf().all()
    partly = replace(solution, proven=torch.tensor([True, False, True]))
    assert certified_errors(partly).isfinite().tolist() == [True, False, True]
