"""The token before: zeros at starts, padding passed over, pieces equal to the whole."""

import torch

from small_models import small_config
from spikelm.cache import SpikeCache
from spikelm.context import ForwardContext
from spikelm.shift import Previous


def run(x, mask=None, positions=None, cuts=(), cache=None):
    shift, pieces = Previous(0, x.shape[-1]), []
    cache = SpikeCache(small_config()) if cache is None else cache
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1) if positions is None else positions
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]]):
        seen = None if mask is None else mask[:, :end]
        context = ForwardContext.build(positions[:, begin:end], seen, cache)
        pieces.append(shift(x[:, begin:end], context))
        context.finish(positions[:, begin:end])
    return torch.cat(pieces, 1)


def test_every_token_sees_the_one_before():
    x = torch.randn(2, 7, 3)
    expected = torch.cat([torch.zeros(2, 1, 3), x[:, :-1]], 1)
    assert torch.equal(run(x), expected)
    assert torch.equal(run(x, cuts=(1, 2, 5)), expected)


def test_padding_is_passed_over():
    x, mask = torch.randn(1, 6, 3), torch.tensor([[0, 1, 0, 1, 0, 1]])
    for cuts in ((), (2,), (3, 5)):
        shifted = run(x, mask, cuts=cuts)
        assert torch.equal(shifted[0, [1, 3, 5]], torch.stack([torch.zeros(3), x[0, 1], x[0, 3]]))


def test_documents_start_from_zero():
    x, positions = torch.randn(1, 6, 3), torch.tensor([[0, 1, 2, 0, 1, 2]])
    for cuts in ((), (3,), (4,)):
        assert torch.equal(run(x, positions=positions, cuts=cuts)[0, 3], torch.zeros(3))
