"""One token's attention in one call: against rotation, concatenation and softmax in float64."""

import pytest
import torch
from kernel_cases import RATIOS, assert_close

from spikelm.kernels import cpp
from spikelm.kernels.attend import AttendCall
from spikelm.mixers.attention import rotate


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpp, "library", lambda *_: None)
    elif cpp.library("attend", "-fopenmp") is None:
        pytest.skip("no C++ compiler")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "batch, queries, shared, width, turned, lengths",
    [
        (1, 4, 2, 16, 16, [0, 1, 2, 15]),
        (2, 9, 3, 64, 64, [255, 256, 257]),
        (3, 3, 3, 20, 12, [37]),
        (8, 2, 1, 7, 6, [63]),
        (1, 6, 2, 128, 64, [700]),
    ],
)
def test_equals_the_definition(path, batch, queries, shared, width, turned, lengths, threads):
    torch.set_num_threads(threads)
    try:
        for length in lengths:
            _compare(batch, queries, shared, width, turned, length)
    finally:
        torch.set_num_threads(1)


def _compare(batch, queries, shared, width, turned, length):
    qkv, heads = torch.randn(batch, (queries + 2 * shared) * width), torch.full((batch, queries * width), float("nan"))
    angles = torch.randn(batch, 1, turned)
    keys, values = (torch.full((batch, shared, length + 5, width), float("nan")) for _ in range(2))
    keys[:, :, :length], values[:, :, :length] = torch.randn(2, batch, shared, length, width)
    past = keys[:, :, :length].double(), values[:, :, :length].double()
    q, k, v = qkv.double().unflatten(1, (-1, width)).split([queries, shared, shared], 1)
    cos, sin = angles.cos(), angles.sin()
    q, k = (rotate(t[:, :, None], cos.double(), sin.double()) for t in (q, k))
    k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v[:, :, None]], 2)
    wide = [t.repeat_interleave(queries // shared, 1) for t in (k, v)]
    expected = torch.softmax(0.3 * q @ wide[0].transpose(2, 3), -1) @ wide[1]

    tables = cos[:, 0].contiguous(), sin[:, 0].contiguous(), torch.tensor([length])
    call = AttendCall(qkv, heads, *tables, queries=queries, shared=shared, scale=0.3)
    call.place(keys, values)
    call()
    assert_close("heads", heads, expected[:, :, 0].flatten(1), RATIOS[torch.float32])
    assert_close("key", keys[:, :, length], k[:, :, -1], RATIOS[torch.float32])
    assert torch.equal(values[:, :, length].double(), v[:, :, -1])
    assert keys[:, :, length + 1 :].isnan().all()


def test_buffers_must_fit():
    angles = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="heads must be contiguous float32"):
        narrow = torch.zeros(1, 32, dtype=torch.float64)
        AttendCall(torch.zeros(1, 64), narrow, angles, angles, torch.zeros(1).long(), queries=2, shared=1, scale=1.0)
