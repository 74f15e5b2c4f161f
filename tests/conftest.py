"""Fixtures for all tests."""

import pytest
import torch

from small_models import EVERY_SITE, PATTERNS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models gain nothing from threads, and lose much where other work shares the cores."""
    torch.set_num_threads(1)


@pytest.fixture(params=list(PATTERNS))
def pattern(request):
    return PATTERNS[request.param]


@pytest.fixture(params=[[], EVERY_SITE], ids=["float", "spiking"])
def sites(request):
    return request.param
