"""Fixtures for all tests."""

import pytest
import torch

from small_models import PATTERNS, SITES


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=list(PATTERNS))
def pattern(request):
    return PATTERNS[request.param]


@pytest.fixture(params=[[], SITES], ids=["float", "spiking"])
def sites(request):
    return request.param
