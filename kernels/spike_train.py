"""Spike trains: integer counts unfolded over T time slots, and back.

    code              counts                    slot t of the train (t = 0 first)   slot weight w_t
    binary            0 ... T                   1 while t < s                       1
    ternary           -T ... T                  sign(s) while t < |s|               1
    bitwise           -(2^T - 1) ... 2^T - 1    sign(s) * bit (T-1-t) of |s|        2^(T-1-t)
    twos_complement   -2^(T-1) ... 2^(T-1) - 1  bit (T-1-t) of s mod 2^T            2^(T-1-t), w_0 < 0

counts s [...] -> trains [T, ...] int8, and s = sum_t w_t train_t exactly for every count that fits; a count
that does not fit is an error, never cut off or wrapped. Binary and ternary are unary codes, filled from the
left; the other two send the most significant bit first (SpikingBrain, arXiv 2509.05276, spike coding).
"""

import torch
from torch import Tensor

from spikelm.kernels.runtime import use_triton

CODES = ("binary", "ternary", "bitwise", "twos_complement")
_SIGNED = ("ternary", "bitwise")
_MAX_BITS = 62


def slots_needed(counts: Tensor, code: str) -> int:
    """The smallest T with which every count fits `code`, at least 1.

    counts: [...], integers in any dtype. Reads the values, so on a GPU it waits for them.

    Raises:
        ValueError: unknown code, a count that is no integer, or a negative count with code "binary".
    """
    _check_code(code)
    low, high = _extremes(counts)
    if code == "binary" and low < 0:
        raise ValueError(_misfit(low, code, None))
    return _slots(low, high, code)


def slot_weights(
    code: str, slots: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Weights w [T] with counts = sum_t w[t] * trains[t]; powers of two, so exact in floating point.

    Raises:
        ValueError: unknown code, or slots out of range.
    """
    _check_code(code)
    _check_slots(code, slots)
    if code in ("binary", "ternary"):
        return torch.ones(slots, dtype=dtype, device=device)
    weights = [2 ** (slots - 1 - t) for t in range(slots)]
    if code == "twos_complement":
        weights[0] = -weights[0]
    return torch.tensor(weights, dtype=dtype, device=device)


def expand(counts: Tensor, code: str, slots: int | None = None) -> Tensor:
    """Unfold counts [...] into trains [T, ...] int8.

    Args:
        counts: [...], integers in any dtype.
        code: one of `CODES`.
        slots: T; None takes the smallest that fits, which reads the values (under torch.compile, name T).

    Returns:
        [T, ...] int8 in {0, 1} (binary, twos_complement) or {-1, 0, 1} (ternary, bitwise).

    Raises:
        ValueError: unknown code, slots out of range, a count that is no integer or does not fit; the message
            names the count and the slots it needs.
    """
    _check_code(code)
    counts = counts.detach()
    if slots is None:
        slots = slots_needed(counts, code)
    _check_slots(code, slots)
    return _expand(counts, code, slots)


def collapse(trains: Tensor, code: str, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fold trains [T, ...] back into counts [...]: sum_t w_t trains_t.

    Args:
        trains: [T, ...] as `expand` returns them, in any dtype.
        code: one of `CODES`.
        dtype: dtype of the counts; float32 holds integers up to 2^24.

    Raises:
        ValueError: unknown code, slots out of range, or a dtype that cannot hold every count of T slots.
    """
    _check_code(code)
    if trains.dim() == 0:
        raise ValueError("trains: expected [T, ...], got a tensor without dimensions; put the slots first")
    slots = trains.shape[0]
    _check_slots(code, slots)
    largest = {"bitwise": 2**slots - 1, "twos_complement": 2 ** (slots - 1)}.get(code, slots)
    exact = 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max
    if largest > exact:
        raise ValueError(
            f"dtype: expected one that holds counts up to {largest} ({code}, {slots} slots), got {dtype}; "
            "pass torch.float64 or torch.int64"
        )
    return _collapse(trains.detach(), code, dtype)


def bit_spikes(counts: Tensor, code: str, slots: int | None = None) -> Tensor:
    """Number of nonzero slots of every count's train, without making the train.

    Args:
        counts: [...], integers in any dtype that fit the code (not checked here; `expand` does).
        code: one of `CODES`.
        slots: T. Only twos_complement depends on it (a negative count fills the leading slots); None takes
            the smallest that fits.

    Returns:
        [...] int32: |s| for binary and ternary, popcount(|s|) for bitwise, popcount(s mod 2^T) for
        twos_complement.

    Raises:
        ValueError: unknown code or slots out of range.
    """
    _check_code(code)
    counts = counts.detach()
    if code == "twos_complement" and slots is None:
        slots = slots_needed(counts, code)
    if slots is not None:
        _check_slots(code, slots)
    return _bit_spikes(counts, code, slots or 0)


def pack(trains: Tensor, *, signed: bool | None = None) -> Tensor:
    """Store trains with one bit per slot and sign.

    Args:
        trains: [T, ..., C] int8 in {-1, 0, 1}.
        signed: two planes (spikes of +1, spikes of -1) if True, one plane if False; None looks for a -1.

    Returns:
        uint8 [planes, T, ..., ceil(C / 8)]; bit j of byte i belongs to channel 8 i + j, unused bits are zero.

    Raises:
        ValueError: fewer than two dimensions, or a dtype other than int8.
    """
    if trains.dim() < 2 or trains.dtype is not torch.int8:
        raise ValueError(
            f"trains: expected int8 [T, ..., C], got {trains.dtype} {list(trains.shape)}; `expand` makes such trains"
        )
    if signed is None:
        signed = bool((trains < 0).any())
    return _pack(trains, 2 if signed else 1)


def unpack(packed: Tensor, channels: int) -> Tensor:
    """Trains int8 [T, ..., channels] from what `pack` stored.

    Raises:
        ValueError: `packed` is not uint8 [1 or 2, T, ..., ceil(channels / 8)].
    """
    width = (channels + 7) // 8
    if packed.dtype is not torch.uint8 or packed.dim() < 3 or packed.shape[0] not in (1, 2) or channels < 1:
        raise ValueError(
            f"packed: expected uint8 [1 or 2, T, ..., bytes] and channels >= 1, got {packed.dtype} "
            f"{list(packed.shape)} and {channels}; pass what `pack` returned"
        )
    if packed.shape[-1] != width:
        raise ValueError(
            f"channels: expected a number that fills {packed.shape[-1]} bytes, got {channels} ({width}); "
            "pass the last dimension of the packed trains"
        )
    return _unpack(packed, channels)


def expand_reference(counts: Tensor, code: str, slots: int) -> Tensor:
    """The definition of `expand`, in plain torch, for counts that fit; also its CPU path."""
    whole = counts.to(torch.int64)
    size = whole if code == "twos_complement" else whole.abs()
    trains = torch.empty(slots, *counts.shape, dtype=torch.int8, device=counts.device)
    for t in range(slots):
        if code in ("binary", "ternary"):
            trains[t] = size > t
        else:
            trains[t] = (size >> (slots - 1 - t)) & 1
    if code in _SIGNED:
        trains *= whole.sign().to(torch.int8)
    return trains


def collapse_reference(trains: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    """The definition of `collapse`, in plain torch; also its CPU path."""
    if code in ("binary", "ternary"):
        return trains.sum(0, dtype=torch.int64).to(dtype)
    total = trains[0].to(torch.int64)
    if code == "twos_complement":
        total = -total
    for slot in trains[1:]:
        total = 2 * total + slot.to(torch.int64)
    return total.to(dtype)


def bit_spikes_reference(counts: Tensor, code: str, slots: int) -> Tensor:
    """The definition of `bit_spikes`, in plain torch; also its CPU path."""
    whole = counts.to(torch.int64)
    if code in ("binary", "ternary"):
        return whole.abs().to(torch.int32)
    whole = whole & ((1 << slots) - 1) if code == "twos_complement" else whole.abs()
    largest = int(whole.max()) if whole.numel() else 0
    # Counts are small as a rule: the narrowest integers make the passes over the bits cheap.
    for narrow in (torch.int8, torch.int16, torch.int32):
        if largest <= torch.iinfo(narrow).max:
            whole = whole.to(narrow)
            break
    total = torch.zeros_like(whole, dtype=torch.int8)
    for bit in range(largest.bit_length()):
        total += ((whole >> bit) & 1).to(torch.int8)
    return total.to(torch.int32)


def pack_reference(trains: Tensor, planes: int) -> Tensor:
    """The definition of `pack`, in plain torch; also its CPU path."""
    spikes = torch.stack([trains > 0, trains < 0][:planes]).to(torch.uint8)
    spikes = torch.nn.functional.pad(spikes, (0, -trains.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = spikes[..., 0].clone()
    for bit in range(1, 8):
        packed |= spikes[..., bit] << bit
    return packed


def unpack_reference(packed: Tensor, channels: int) -> Tensor:
    """The definition of `unpack`, in plain torch; also its CPU path."""
    bits = torch.stack([(packed >> bit) & 1 for bit in range(8)], -1).flatten(-2)
    bits = bits[..., :channels].to(torch.int8)
    return bits[0] - bits[1] if packed.shape[0] == 2 else bits[0].clone()


def _extremes(counts: Tensor) -> tuple[int, int]:
    """Smallest and largest count, as exact Python integers; raises if one is no integer."""
    if counts.numel() == 0:
        return 0, 0
    if counts.is_floating_point() and bool((counts != counts.round()).any()):
        odd = counts[counts != counts.round()].flatten()[0].item()
        raise ValueError(f"counts: expected integers, got {odd}; code real values with spike_encode first")
    low, high = torch.aminmax(counts)
    if counts.is_floating_point() and not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("counts: expected finite integers, got inf; check the activations in front")
    return int(low), int(high)


def _slots(low: int, high: int, code: str) -> int:
    if code in ("binary", "ternary"):
        return max(1, high, -low)
    if code == "bitwise":
        return max(1, max(high, -low).bit_length())
    return 1 + max(max(high, 0).bit_length(), max(-low - 1, 0).bit_length())


def _misfit(count: int, code: str, slots: int | None) -> str:
    if code == "binary" and count < 0:
        return f"counts: code 'binary' holds counts >= 0, got {count}; use a signed code, one of {CODES[1:]}"
    needed = _slots(count, count, code)
    return (
        f"counts: {count} does not fit code {code!r} with slots={slots}; it needs slots={needed} "
        "(or clip the counts with max_count)"
    )


def _check_fit(counts: Tensor, code: str, slots: int) -> None:
    low, high = _extremes(counts)
    if code == "binary" and low < 0:
        raise ValueError(_misfit(low, code, slots))
    for count in (low, high):
        if _slots(count, count, code) > slots:
            raise ValueError(_misfit(count, code, slots))


def _check_code(code: str) -> None:
    if code not in CODES:
        raise ValueError(f"code: expected one of {CODES}, got {code!r}; choose one of them")


def _check_slots(code: str, slots: int) -> None:
    if slots < 1:
        raise ValueError(f"slots: expected at least 1, got {slots}; `slots_needed` tells how many it takes")
    if code in ("bitwise", "twos_complement") and slots > _MAX_BITS:
        raise ValueError(f"slots: expected at most {_MAX_BITS} for {code!r}, got {slots}; clip the counts")


@torch.library.custom_op("spikelm::spike_expand", mutates_args=())
def _expand(counts: Tensor, code: str, slots: int) -> Tensor:
    _check_fit(counts, code, slots)
    if use_triton(counts):
        from spikelm.kernels.spike_train_triton import expand_triton

        return expand_triton(counts, code, slots)
    return expand_reference(counts, code, slots)


@_expand.register_fake
def _(counts, code, slots):
    return counts.new_empty((slots, *counts.shape), dtype=torch.int8)


@torch.library.custom_op("spikelm::spike_collapse", mutates_args=())
def _collapse(trains: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    if use_triton(trains):
        from spikelm.kernels.spike_train_triton import collapse_triton

        return collapse_triton(trains, code, dtype)
    return collapse_reference(trains, code, dtype)


@_collapse.register_fake
def _(trains, code, dtype):
    return trains.new_empty(trains.shape[1:], dtype=dtype)


@torch.library.custom_op("spikelm::bit_spikes", mutates_args=())
def _bit_spikes(counts: Tensor, code: str, slots: int) -> Tensor:
    if use_triton(counts):
        from spikelm.kernels.spike_train_triton import bit_spikes_triton

        return bit_spikes_triton(counts, code, slots)
    return bit_spikes_reference(counts, code, slots)


@_bit_spikes.register_fake
def _(counts, code, slots):
    return counts.new_empty(counts.shape, dtype=torch.int32)


@torch.library.custom_op("spikelm::spike_pack", mutates_args=())
def _pack(trains: Tensor, planes: int) -> Tensor:
    if use_triton(trains):
        from spikelm.kernels.spike_train_triton import pack_triton

        return pack_triton(trains, planes)
    return pack_reference(trains, planes)


@_pack.register_fake
def _(trains, planes):
    return trains.new_empty((planes, *trains.shape[:-1], (trains.shape[-1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("spikelm::spike_unpack", mutates_args=())
def _unpack(packed: Tensor, channels: int) -> Tensor:
    if use_triton(packed):
        from spikelm.kernels.spike_train_triton import unpack_triton

        return unpack_triton(packed, channels)
    return unpack_reference(packed, channels)


@_unpack.register_fake
def _(packed, channels):
    return packed.new_empty((*packed.shape[1:-1], channels), dtype=torch.int8)
