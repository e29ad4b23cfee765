import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

for folder in (Path(__file__).parent, Path(__file__).parent.parent / "benchmarks"):
    sys.path.insert(0, str(folder))
settings.register_profile(
    "perron", deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True
)
settings.load_profile("perron")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take all cores stand in each other's way.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
