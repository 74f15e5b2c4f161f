"""Which tier a test belongs to, and memory that betrays whoever leaves it unwritten or writes beside it."""

import pytest
import torch

from spikelm.kernels.runtime import HAS_TRITON, INTERPRETED

BAND = 64
SENTINEL = -7.0


def pytest_collection_modifyitems(items):
    reasons = {
        "interpret": None if INTERPRETED else "needs TRITON_INTERPRET=1",
        "compile": "must not run under TRITON_INTERPRET" if INTERPRETED else None,
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
    }
    if not HAS_TRITON:
        reasons["interpret"] = reasons["compile"] = "needs Triton"
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def one_thread():
    """The cases are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch):
    """Floating-point memory comes filled with NaN, between two bands that must be found untouched at the end."""
    buffers, plain = [], torch.empty

    def allocate(shape, dtype, device):
        size = int(torch.Size(shape).numel())
        buffer = torch.full((size + 2 * BAND,), SENTINEL, dtype=dtype, device=device)
        buffer[BAND : BAND + size] = float("nan")
        buffers.append(buffer)
        return buffer[BAND : BAND + size].view(shape)

    def empty(*size, dtype=None, device=None, **kwargs):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if kwargs or not dtype.is_floating_point or any(type(n) is not int for n in shape):
            return plain(*size, dtype=dtype, device=device, **kwargs)
        return allocate(shape, dtype, device)

    def empty_like(x, *, dtype=None, device=None, **kwargs):
        return empty(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    def new_empty(x, *size, dtype=None, device=None):
        return empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert (buffer[:BAND] == SENTINEL).all() and (buffer[-BAND:] == SENTINEL).all(), "written outside a tensor"
