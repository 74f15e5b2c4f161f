"""WKV: every path against the definition, masks, packing, pieces and steps, memory, errors."""

import pytest
import torch
from kernel_cases import RATIOS, assert_close, banded, place, tiers

from spikelm.kernels.wkv import CHUNK, EMPTY, chunked_wkv, wkv, wkv_reference, wkv_step

SHAPES = {
    "one": (1, 1, 1, ()),
    "T1": (2, 1, 3, ()),
    "T15": (2, 15, 20, ()),
    "T37": (1, 37, 33, ()),
    "T63": (2, 63, 17, ()),
    "T100": (3, 100, 20, ()),
    "packed": (1, 40, 33, (0, 0, 6, 6, 7, 40)),
    "empty": (2, 0, 4, ()),
    "empty-packed": (1, 0, 4, (0, 0)),
}
NAMES = ("y", "state", "dk", "dv", "dw", "du", "dstate")
EVERYTHING = ("middle", "weak", "strong", "large", "masked")


def problem(shape, kind, dtype, device, wide=None):
    """Leaves k, v, w, u, state; bounds and masks; gradients of y and state. `wide`: the same numbers in that dtype."""
    batch, length, width, bounds = SHAPES[shape]
    random = torch.Generator().manual_seed(length + 7 * EVERYTHING.index(kind))
    k, v, dy = (torch.randn(batch, length, width, generator=random) for _ in range(3))
    decay = {"weak": 0.01, "strong": 30.0}.get(kind, 2.0)
    w, u = -decay * torch.rand(width, generator=random), torch.randn(width, generator=random)
    sequences = len(bounds) - 1 if bounds else batch
    state, dstate = (torch.randn(sequences, rows, width, generator=random) for rows in (3, 2))
    state[:, 1] = state[:, 1].abs() + 0.5
    if kind == "large":
        k, state[:, 2] = 120.0 * torch.rand(k.shape, generator=random) - 60.0, 40.0 * state[:, 2]
    masks = {}
    if kind == "masked":
        state[:, :, ::3] = torch.tensor([0.0, 0.0, EMPTY])[:, None]
        masks["valid"] = torch.rand(batch, length, generator=random) < 0.7
        masks["reset_mask"] = torch.rand(batch, length, generator=random) < 0.15
    convert = (lambda t: t.to(place(device), wide)) if wide else (lambda t: t.to(place(device)))
    leaves = [banded(convert(t)).requires_grad_() for t in (k.to(dtype), v.to(dtype), w, u, state)]
    options = {name: mask.to(place(device)) for name, mask in masks.items()}
    options["cu_seqlens"] = torch.tensor(bounds, device=place(device)) if bounds else None
    return leaves, options, [convert(dy.to(dtype)), convert(dstate)]


def run(op, leaves, options, upstream):
    """Two results and all gradients. Of a state, what does not depend on its scale: p / q and the logarithm of q e^o."""
    y, state = op(*leaves[:4], initial_state=leaves[4], **options)
    p, q, o = state.unbind(1)
    none = q == 0
    state = torch.stack([p / q.masked_fill(none, 1.0), (q.masked_fill(none, 1.0)).log() + o.masked_fill(none, 0.0)], 1)
    outputs = [(o, d) for o, d in zip((y, state), upstream) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in outputs], leaves, [d for _, d in outputs], materialize_grads=True)
    return y, state, *grads


def compare(shape, kind, dtype, device):
    results = run(wkv, *problem(shape, kind, dtype, device))
    expected = run(wkv_reference, *problem(shape, kind, dtype, device, torch.float64))
    assert [r.dtype for r in results] == [dtype, torch.float32, dtype, dtype, *[torch.float32] * 3]
    for name, got, want in zip(NAMES, results, expected):
        assert_close(name, got, want, RATIOS[dtype])


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_against_the_definition(device, shape, kind):
    if device == "interpreted" and not (kind == "masked" and shape != "T63" or shape == "T37"):
        pytest.skip("slow to interpret, and others cross chunks and sequences too")
    compare(shape, kind, torch.float32, device)


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(device, dtype):
    compare("T37", "masked", dtype, device)
