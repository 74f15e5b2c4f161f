"""Spike trains: exact both ways for every count that fits, an error for every other, packed storage."""

import pytest
import torch

from spikelm.kernels import spike_train as module
from spikelm.kernels.spike_train import CODES, bit_spikes, collapse, expand, pack, slot_weights, slots_needed, unpack

TIERS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cpu", id="interpreted", marks=pytest.mark.interpret),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
tiers = pytest.mark.parametrize("device", TIERS)
codes = pytest.mark.parametrize("code", CODES)


def reach(code: str, slots: int) -> tuple[int, int]:
    """Smallest and largest count that fit."""
    return {
        "binary": (0, slots),
        "ternary": (-slots, slots),
        "bitwise": (1 - 2**slots, 2**slots - 1),
        "twos_complement": (-(2 ** (slots - 1)), 2 ** (slots - 1) - 1),
    }[code]


@pytest.mark.usefixtures("poisoned")
@tiers
@codes
@pytest.mark.parametrize("slots", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16], ids=str)
def test_every_count_that_fits_comes_back(device, code, slots, dtype):
    low, high = reach(code, slots)
    counts = torch.arange(low, high + 1, device=device).to(dtype)
    if dtype is torch.bfloat16:
        counts = counts[counts.abs() <= 256]
    trains = expand(counts, code, slots)
    assert trains.dtype is torch.int8 and trains.shape == (slots, *counts.shape)
    assert set(trains.unique().tolist()) <= ({-1, 0, 1} if code in ("ternary", "bitwise") else {0, 1})
    assert torch.equal(collapse(trains, code, dtype=dtype), counts)
    weights = slot_weights(code, slots, device=device)
    assert torch.equal((weights[:, None] * trains).sum(0), counts.float())
    assert torch.equal(bit_spikes(counts, code, slots), (trains != 0).sum(0).int())
    assert torch.equal(trains, module.expand_reference(counts, code, slots))
    assert torch.equal(unpack(pack(trains), len(counts)), trains)


@codes
def test_slots_needed_is_the_smallest_that_fits(code):
    for slots in range(1, 10):
        for count in reach(code, slots):
            if count not in range(reach(code, slots - 1)[0], reach(code, slots - 1)[1] + 1) if slots > 1 else True:
                assert slots_needed(torch.tensor([0.0, count]), code) == slots
    assert slots_needed(torch.zeros(3), code) == 1
    assert slots_needed(torch.zeros(0, 3), code) == 1


@tiers
@codes
def test_a_count_that_does_not_fit_is_an_error(device, code):
    low, high = reach(code, 3)
    for count in (low - 1, high + 1):
        counts = torch.tensor([[0.0, count]], device=device)
        if code == "binary" and count < 0:
            message = f"code 'binary' holds counts >= 0, got {count}"
        else:
            message = f"counts: {count} does not fit code '{code}' with slots=3; it needs slots=4"
        with pytest.raises(ValueError, match=message):
            expand(counts, code, 3)


@pytest.mark.parametrize(
    ("count", "code", "slots", "train"),
    [
        (5, "ternary", 7, [1, 1, 1, 1, 1, 0, 0]),
        (5, "binary", 6, [1, 1, 1, 1, 1, 0]),
        (-2, "ternary", 3, [-1, -1, 0]),
        (-5, "bitwise", 3, [-1, 0, -1]),
        (-5, "twos_complement", 4, [1, 0, 1, 1]),
        (-128, "twos_complement", 8, [1, 0, 0, 0, 0, 0, 0, 0]),
        (6, "bitwise", 4, [0, 1, 1, 0]),
    ],
)
def test_published_trains(count, code, slots, train):
    assert expand(torch.tensor(count), code, slots).tolist() == train


def test_published_lengths():
    """A count of 256 takes 256 binary slots, or 8 bits with the symmetric range of 7 and a sign."""
    assert slots_needed(torch.tensor([256]), "binary") == 256
    assert slots_needed(torch.tensor([255]), "bitwise") == 8
    assert slots_needed(torch.tensor([-127, 127]), "bitwise") == 7
    assert slots_needed(torch.tensor([-128]), "twos_complement") == 8


@tiers
@codes
def test_large_counts_are_exact(device, code):
    if code in ("binary", "ternary"):
        counts = torch.tensor([0, 1, 300], device=device)
    else:
        counts = torch.tensor([0, 1, 2**30 + 1, 2**40 + 12345, 2**60 - 1, -(2**60) + 1], device=device)
    slots = slots_needed(counts, code)
    trains = expand(counts, code)
    assert trains.shape[0] == slots
    assert torch.equal(collapse(trains, code, dtype=torch.int64), counts)
    assert torch.equal(bit_spikes(counts, code, slots), (trains != 0).sum(0).int())


@tiers
@pytest.mark.parametrize("shape", [(3, 4, 19), (2, 8), (5,), (0, 3), (2, 600)])
def test_shapes_strides_and_packing(device, shape):
    counts = torch.randint(-7, 8, shape, device=device).float()
    trains = expand(counts, "bitwise", 3)
    packed = pack(trains, signed=True)
    assert packed.dtype is torch.uint8 and packed.shape == (2, 3, *shape[:-1], (shape[-1] + 7) // 8)
    assert torch.equal(unpack(packed, shape[-1]), trains)
    assert pack(trains.abs()).shape[0] == 1
    if len(shape) > 1:
        turned = counts.transpose(0, 1)
        assert torch.equal(expand(turned, "bitwise", 3), trains.transpose(1, 2))
        assert torch.equal(collapse(trains.transpose(1, 2), "bitwise"), turned)


def test_packed_bits_are_where_the_docs_say():
    trains = torch.zeros(1, 10, dtype=torch.int8)
    trains[0, 3], trains[0, 9] = 1, -1
    assert pack(trains).flatten().tolist() == [8, 0, 0, 2]


def test_bit_spikes_of_a_negative_count_depend_on_the_slots():
    counts = torch.tensor([-1.0])
    assert bit_spikes(counts, "twos_complement", 4).item() == 4
    assert bit_spikes(counts, "twos_complement", 8).item() == 8
    assert bit_spikes(counts, "twos_complement").item() == 1
    assert bit_spikes(counts, "bitwise").item() == 1


@tiers
@codes
def test_opcheck(device, code):
    counts = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]], device=device)
    trains = expand(counts, code, 3)
    torch.library.opcheck(module._expand, (counts, code, 3))
    torch.library.opcheck(module._collapse, (trains, code, torch.float32))
    torch.library.opcheck(module._bit_spikes, (counts, code, 3))
    torch.library.opcheck(module._pack, (trains, 2))
    torch.library.opcheck(module._unpack, (pack(trains), 3))


@codes
def test_torch_compile_without_a_graph_break(code):
    counts = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])

    def use(counts):
        trains = expand(counts, code, 3)
        return collapse(trains, code) + bit_spikes(counts, code, 3), unpack(pack(trains, signed=True), 3)

    expected, got = use(counts), torch.compile(use, fullgraph=True, backend="aot_eager")(counts)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expand(torch.ones(2), "morse"), "code: expected one of"),
        (lambda: expand(torch.ones(2), "binary", 0), "slots: expected at least 1"),
        (lambda: expand(torch.ones(2), "bitwise", 80), "slots: expected at most 62"),
        (lambda: expand(torch.tensor([1.5]), "bitwise", 3), "counts: expected integers, got 1.5"),
        (lambda: expand(torch.tensor([torch.nan]), "bitwise", 3), "counts: expected integers, got nan"),
        (lambda: slots_needed(torch.tensor([torch.inf]), "bitwise"), "counts: expected finite integers"),
        (lambda: slots_needed(torch.tensor([-1]), "binary"), "code 'binary' holds counts >= 0, got -1"),
        (lambda: collapse(torch.zeros(30, 2, dtype=torch.int8), "bitwise"), "dtype: expected one that holds"),
        (lambda: collapse(torch.zeros(()), "binary"), "trains: expected"),
        (lambda: pack(torch.zeros(2, 3)), "trains: expected int8"),
        (lambda: unpack(torch.zeros(1, 2, 1, dtype=torch.uint8), 9), "channels: expected"),
        (lambda: unpack(torch.zeros(3, 2, 1, dtype=torch.uint8), 8), "packed: expected uint8"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
