"""What `window_linear` carries from token to token, and how padding and an earlier state become one packed stream.

The registered op knows packed sequences and documents that begin anew, nothing else. Here the real tokens of every
sequence, the kept ones of its state in front, are moved together; padding goes behind the last sequence as zeros. All
shapes are known beforehand, so this is plain torch that traces and differentiates.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.runtime import check_cu_seqlens, check_floating, expect, sequence_bounds, wide_dtype

# Below this, a sum of weights is taken for it. The largest weight in a window is gamma, so that only happens where
# gamma is next to nothing and so is the past.
EPSILON = 1e-30


class WindowState(NamedTuple):
    """What N sequences carry from token to token; token i of a document stands in slot i mod (window - 1).

    Attributes:
        keys: [N, Hk, window - 1, D], those that the next token still sees in its window, in the dtype of k. Slots not
            yet written hold anything finite, zeros if they come from an op.
        values: [N, Hk, window - 1, V], as keys.
        features: [N, Hk, window - 1, F], as keys.
        sums: [N, Hk, F, V], the sum of fk^T v over the tokens that have left the window; float32 (float64).
        norm: [N, Hk, F], the sum of their fk; float32 (float64).
        length: [N] int64, tokens of the document so far.
    """

    keys: Tensor
    values: Tensor
    features: Tensor
    sums: Tensor
    norm: Tensor
    length: Tensor


class Stream(NamedTuple):
    """Real tokens of all sequences in one row.

    Attributes:
        source: [M] int64, where each token comes from: the kept ones of the states (N * (window - 1), by sequence and
            age), then the B * T tokens of the batch, then one of zeros, which stands for all that is not real.
        place: [B * T] int64, where in the stream each token of the batch went.
        bounds: [N + 2] int64, where sequences begin; the last one is the padding.
        reset: [M] bool, where a document begins, or None.
    """

    source: Tensor
    place: Tensor
    bounds: Tensor
    reset: Tensor | None

    def gather(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, T, heads, C] and kept [N, window - 1, heads, C], by default zeros -> [1, M, heads, C]."""
        tokens = x.flatten(0, 1)
        missing = self.source.shape[0] - tokens.shape[0]
        first = x.new_zeros(missing, *x.shape[2:]) if kept is None else kept.flatten(0, 1)
        return torch.cat([first, tokens, x.new_zeros(1, *x.shape[2:])])[self.source].unsqueeze(0)


def make_stream(
    length: Tensor, valid: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, shape: torch.Size, kept: int
) -> Stream:
    """The stream of N sequences whose documents had `length` [N] tokens so far, the last `kept` of them kept.

    valid, reset [B, T] = shape; with cu_seqlens B = 1.
    """
    n, device = length.shape[0], length.device
    owner = torch.arange(n, device=device)
    tokens = torch.arange(shape[0] * shape[1], device=device)
    if cu_seqlens is None:
        owners = owner.repeat_interleave(shape[1])
    else:
        owners = torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)
    if valid is not None:
        owners = owners.where(valid.flatten(), n)
    written = torch.arange(kept, device=device) >= kept - length[:, None]
    key = torch.cat([owner[:, None].where(written, n).flatten(), owners])
    order = key.argsort(stable=True)
    bounds = torch.searchsorted(key[order], torch.arange(n + 2, device=device))
    slots = torch.arange(key.shape[0], device=device)
    source = order.where(slots < bounds[n], key.shape[0])
    if reset is not None:
        reset = F.pad(reset.flatten(), (n * kept, 1))[source]
    return Stream(source, order.argsort()[n * kept :], bounds, reset)


def by_age(slots: Tensor, length: Tensor) -> Tensor:
    """[N, Hk, kept, C] by slot -> [N, kept, Hk, C] from the oldest to the newest, slots not yet written first."""
    kept = slots.shape[2]
    if not kept:
        return slots.transpose(1, 2)
    index = (length[:, None] + torch.arange(kept, device=length.device)) % kept
    return slots.transpose(1, 2).gather(1, index[:, :, None, None].expand(-1, -1, slots.shape[1], slots.shape[3]))


def last_state(
    tokens: tuple[Tensor, Tensor, Tensor],
    bounds: Tensor,
    reset: Tensor | None,
    before: Tensor | None,
    kept: int,
    sums: Tensor,
    norm: Tensor,
) -> WindowState:
    """The state behind N sequences of k, v, fk, each [M, Hk, C].

    Args:
        tokens: k, v and fk.
        bounds: [N + 1], where sequences begin, kept tokens of an earlier call included.
        reset: [M] bool, where documents begin, or None.
        before: [N], tokens of the documents that stand in no sequence any more; None: none.
        kept: window - 1.
        sums: as in `WindowState`.
        norm: as in `WindowState`.
    """
    begin, end = bounds[:-1], bounds[1:]
    slots = torch.arange(tokens[0].shape[0], device=begin.device)
    if reset is not None and slots.shape[0]:
        latest = slots.where(reset, -1).cummax(0).values[(end - 1).clamp_min(0)]
        latest = latest.where(end > begin, -1)
        if before is not None:
            before = before * (latest < begin)
        begin = begin.maximum(latest)
    length = end - begin if before is None else end - begin + before
    # The newest token of the document that stands in each slot is `age` tokens before its end.
    age = 1 + (length[:, None] - 1 - torch.arange(kept, device=begin.device)) % max(kept, 1)
    written = age <= length[:, None]
    index = (end[:, None] - age).where(written, 0)

    def gather(x: Tensor) -> Tensor:
        rows = x if x.shape[0] else x.new_zeros(1, *x.shape[1:])
        return rows[index].masked_fill(~written[:, :, None, None], 0.0).transpose(1, 2)

    return WindowState(gather(tokens[0]), gather(tokens[1]), gather(tokens[2]), sums, norm, length)


def empty_state(k: Tensor, v: Tensor, fk: Tensor, sequences: int, window: int) -> WindowState:
    """The state of `sequences` that have seen nothing; k, v and fk [..., Hk, C] give widths, dtypes and device."""
    shared, wide = k.shape[-2], wide_dtype(k, v, fk)
    keys, values, features = (x.new_zeros(sequences, shared, window - 1, x.shape[-1]) for x in (k, v, fk))
    sums = k.new_zeros(sequences, shared, fk.shape[-1], v.shape[-1], dtype=wide)
    length = torch.zeros(sequences, dtype=torch.int64, device=k.device)
    norm = k.new_zeros(sequences, shared, fk.shape[-1], dtype=wide)
    return WindowState(keys, values, features, sums, norm, length)


class Parts(NamedTuple):
    """Sequences cut where documents begin: P parts, one behind the other in B * T tokens.

    Attributes:
        bounds: P + 1 first tokens.
        source: per part the sequence whose state it begins with, or -1 for none.
        last: per sequence its last part.
    """

    bounds: list[int]
    source: list[int]
    last: list[int]

    def enter(self, x: Tensor | None, shape: tuple[int, ...], wide: torch.dtype, device: torch.device) -> Tensor:
        """States of the sequences [N, *shape], or None for zeros -> of the parts when they begin, [P, *shape]."""
        if x is None:
            return torch.zeros(len(self.source), *shape, dtype=wide, device=device)
        source = torch.tensor(self.source, dtype=torch.int64, device=device)
        known = (source >= 0).view(-1, *(1 for _ in shape))
        return x.to(wide)[source.clamp_min(0)].masked_fill_(~known, 0.0)

    def leave(self, x: Tensor) -> Tensor:
        """States of the parts at their ends, [P, ...] -> of the sequences [N, ...]."""
        return (
            x if len(self.last) == len(self.source) else x[torch.tensor(self.last, dtype=torch.int64, device=x.device)]
        )

    def enter_back(self, x: Tensor | None, shape: tuple[int, ...], wide: torch.dtype, device: torch.device) -> Tensor:
        """Backward of `leave`, from gradients in any layout or None."""
        grads = torch.zeros(len(self.source), *shape, dtype=wide, device=device)
        last = torch.tensor(self.last, dtype=torch.int64, device=device)
        return grads if x is None else grads.index_copy_(0, last, x.to(wide))

    def leave_back(self, x: Tensor) -> Tensor:
        """Backward of `enter`: [P, ...] -> [N, ...]."""
        first = [0, *(part + 1 for part in self.last)][:-1]
        known = torch.tensor([self.source[part] >= 0 for part in first], dtype=torch.bool, device=x.device)
        first = torch.tensor(first, dtype=torch.int64, device=x.device)
        return x[first].masked_fill_(~known.view(-1, *(1 for _ in x.shape[1:])), 0.0)


def cut_sequences(cu_seqlens: Tensor | None, reset: Tensor | None, batch: int, length: int) -> Parts:
    """Parts of the sequences; reads the values of both tensors. A sequence without tokens is a part too."""
    bounds = [row * length for row in range(batch + 1)]
    if cu_seqlens is not None:
        bounds = sequence_bounds("window_linear", cu_seqlens, length)
    resets = [] if reset is None else reset.flatten().nonzero().flatten().tolist()
    parts, source, last, i = [0], [], [], 0
    for n, (begin, end) in enumerate(pairwise(bounds)):
        source.append(n)
        while i < len(resets) and resets[i] < end:
            if resets[i] == begin:
                source[-1] = -1
            else:
                parts.append(resets[i])
                source.append(-1)
            i += 1
        parts.append(end)
        last.append(len(source) - 1)
    return Parts(parts, source, last)


def check_window_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    gamma: Tensor,
    window: int,
    state: WindowState | None,
    valid: Tensor | None,
    reset_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument that does not fit the others."""
    op = "window_linear"
    floats = {} if state is None else dict(zip(WindowState._fields, state[:5]))
    check_floating(op, q=q, k=k, v=v, fq=fq, fk=fk, gamma=gamma, **floats)
    for name, x in (("q", q), ("k", k), ("v", v), ("fq", fq), ("fk", fk)):
        expect(x.ndim == 4, op, name, "[B, T, heads, width]", tuple(x.shape), "Give the heads an axis of their own.")
    batch, length, heads, width = q.shape
    shared, features = k.shape[2], fk.shape[-1]
    expect(
        shared > 0 and heads % shared == 0,
        op,
        "the number of query heads",
        f"a multiple of the {shared} key-value heads",
        heads,
        "Query head h reads key-value head h // (H / Hk).",
    )
    keyed = [batch, length, shared]
    shapes = {
        "k": (k, [*keyed, width]),
        "v": (v, [*keyed, v.shape[-1]]),
        "fq": (fq, [batch, length, heads, features]),
        "fk": (fk, [*keyed, features]),
        "gamma": (gamma, [heads]),
        "valid": (valid, [batch, length]),
        "reset_mask": (reset_mask, [batch, length]),
    }
    expect(isinstance(window, int) and window >= 1, op, "window", "an int >= 1", window, "It counts the query's token.")
    check_cu_seqlens(op, cu_seqlens, batch)
    if state is not None:
        n = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        for name, size in (("keys", width), ("values", v.shape[-1]), ("features", features)):
            shapes[name] = getattr(state, name), [n, shared, window - 1, size]
        shapes["sums"] = state.sums, [n, shared, features, v.shape[-1]]
        shapes["norm"] = state.norm, [n, shared, features]
        shapes["length"] = state.length, [n]
    for name, (x, shape) in shapes.items():
        got = None if x is None else tuple(x.shape)
        expect(x is None or list(x.shape) == shape, op, name, f"of shape {shape}", got, "See the other arguments.")
    for name, x in (("valid", valid), ("reset_mask", reset_mask)):
        expect(
            x is None or x.dtype == torch.bool, op, name, "bool", None if x is None else x.dtype, "Compare it first."
        )
