"""What one forward pass carries: padding, document boundaries, positions, rotary tables, cache, cross-layer values.

Time is counted per row in real tokens: `time[b, t]` is the index of a token among the real tokens of its row, over all
passes that share a cache, and -1 for padding; `start[b, t]` is the time at which the token's document began. A key is
visible to a query iff `start[query] <= time[key] <= time[query]`, and to a window of width w iff also
`time[key] > time[query] - w`. So padding, wherever it stands, never takes a place in a window, and documents packed
into one row never see each other.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spikelm.cache import SpikeCache


@dataclass
class KeyView:
    """Which cached and new keys the queries of one pass see, for one window geometry.

    Attributes:
        mask: `[B, 1, T, L]` bool, True where visible; None if plain causality (or full view of a single query) says it.
        keep: which of the L keys stay in the cache: None for all, an int n for the last n, or indices `[B, n]`.
    """

    mask: Tensor | None
    keep: Tensor | int | None

    def retained(self, states: Tensor) -> Tensor:
        """The part of `[B, H, L, D]` that stays in the cache."""
        if self.keep is None:
            return states
        if isinstance(self.keep, int):
            return states[:, :, max(states.shape[2] - self.keep, 0) :]
        index = self.keep[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, index)


@dataclass
class ForwardContext:
    """One forward pass. Mixers, ffns and spike sites receive it beside their input.

    Attributes:
        valid: `[B, T]` bool, False for padding; None if every token is real.
        boundary: `[B, T]` bool, True where a new document begins and states must be reset; None if nowhere.
        time, start: `[B, T]` int64, see above.
        rope: name -> (cos, sin), each `[B, T, rotary_dim]`.
        cache: the states of earlier passes, or None.
        values: values that cross layers, by name.
    """

    valid: Tensor | None
    boundary: Tensor | None
    time: Tensor
    start: Tensor
    rope: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cache: SpikeCache | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    plain: bool = False
    _views: dict[tuple, KeyView] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        cache: SpikeCache | None,
        restarts: Tensor | None = None,
    ) -> "ForwardContext":
        """Derive padding, time and document boundaries.

        Args:
            position_ids: `[B, T]` int64. A position that does not grow starts a new document.
            attention_mask: `[B, T]` or `[B, past + T]`, 0 for padding; None: no padding.
            cache: the states of earlier passes.
            restarts: `[B, T]` bool from `cu_seqlens`; replaces what `position_ids` would say.
        """
        batch, length = position_ids.shape
        valid = _padding(attention_mask, length)
        before = cache.shared.states if cache is not None else {}
        tokens = before.get("tokens", position_ids.new_zeros(batch))
        tracing = torch.compiler.is_compiling()

        new = torch.zeros_like(position_ids, dtype=torch.bool)
        if restarts is not None:
            new = restarts.clone()
        else:
            new[:, 1:] = _not_growing(position_ids, valid)
            if "position" in before:
                last = before["position"]
                first = (
                    position_ids if valid is None else position_ids.masked_fill(~valid, torch.iinfo(torch.int64).max)
                )
                index = torch.zeros_like(last) if valid is None else valid.int().argmax(1)
                restarted = first.gather(1, index[:, None])[:, 0] <= last
                new.scatter_(1, index[:, None], (restarted & (tokens > 0))[:, None])
        if valid is not None:
            new &= valid

        steps = torch.ones_like(position_ids) if valid is None else valid.long()
        time = tokens[:, None] + steps.cumsum(1) - 1
        origin = before.get("start", torch.zeros_like(tokens))
        start = torch.where(new, time, -1).cummax(1).values.maximum(origin[:, None])
        if valid is not None:
            time = time.masked_fill(~valid, -1)
        # Reading a tensor's value stalls a GPU and breaks a graph, so it is done once here, and not while tracing.
        boundary = new if tracing or bool(new.any()) else None
        plain = valid is None and boundary is None and not tracing and (cache is None or cache.plain)
        return cls(valid, boundary, time, start, cache=cache, plain=plain)

    @classmethod
    def next_token(cls, cache: SpikeCache) -> tuple["ForwardContext", Tensor]:
        """What `build` makes of one token that goes on behind a plain cache, and its positions `[B, 1]`.

        Decoding spends its time in many small steps: here nothing is looked for that cannot be there.
        """
        shared = cache.shared.states
        context = cls(None, None, shared["tokens"][:, None], shared["start"][:, None], cache=cache, plain=True)
        return context, shared["position"][:, None] + 1

    def keys(self, window: int | None = None, sinks: int = 0, off_by_one: bool = False) -> KeyView:
        """The view of cached and new keys for full attention (`window=None`) or a window of that width."""
        geometry = (window, sinks, off_by_one)
        if geometry not in self._views:
            self._views[geometry] = self._view(window, sinks, off_by_one)
        return self._views[geometry]

    def _view(self, window: int | None, sinks: int, off_by_one: bool) -> KeyView:
        length = self.time.shape[1]
        name = f"times.{window}.{sinks}"
        key_time = self.time
        if self.cache is not None and name in self.cache.shared.states:
            key_time = torch.cat([self.cache.shared.states[name], self.time], 1)
        total = key_time.shape[1]
        width = None if window is None else window + (off_by_one and length > 1)

        unmasked = self.plain and (width is None or total <= width) and (total == length or length == 1)
        mask = None if unmasked else self._mask(key_time, width, sinks)
        keep: Tensor | int | None = None
        if self.cache is not None:
            if window is not None:
                recent = window - 1 + off_by_one
                keep = recent if self.plain and sinks == 0 else self._keep(key_time, recent, sinks)
            view = KeyView(mask, keep)
            self.cache.shared.states[name] = view.retained(key_time[:, None, :, None])[:, 0, :, 0]
            return view
        return KeyView(mask, keep)

    def _mask(self, key_time: Tensor, width: int | None, sinks: int) -> Tensor:
        query, start, key = self.time[:, :, None], self.start[:, :, None], key_time[:, None, :]
        visible = (key >= start) & (key <= query)
        if width is not None:
            visible &= (key > query - width) | (key < start + sinks)
        if self.valid is not None:
            # A padding query sees itself, so that no row of the softmax is empty.
            slots = torch.arange(key_time.shape[1], device=key_time.device)
            own = slots[-query.shape[1] :, None] == slots
            visible |= own & ~self.valid[:, :, None]
        return visible[:, None]

    def _keep(self, key_time: Tensor, recent: int, sinks: int) -> Tensor:
        """Indices `[B, n]`, in order of time, of the keys that a later query can still see (padded with others)."""
        last, start = self._last()
        useful = (key_time >= start) & ((key_time > last - recent) | (key_time < start + sinks))
        rank = torch.where(useful, key_time + key_time.shape[1] + last.max() + 1, key_time)
        n = min(recent + sinks, key_time.shape[1])
        return rank.topk(n, dim=1).indices.sort(dim=1).values

    def _last(self) -> tuple[Tensor, Tensor]:
        """Time and document start `[B, 1]` of the last real token of each row, this pass included."""
        if self.plain:
            return self.time[:, -1:], self.start[:, -1:]
        last = self.time.max(1, keepdim=True).values
        if self.cache is not None and "tokens" in self.cache.shared.states:
            last = last.maximum(self.cache.shared.states["tokens"][:, None] - 1)
        return last, self.start.max(1, keepdim=True).values

    def finish(self, position_ids: Tensor) -> None:
        """Store in the cache what the next pass must know."""
        if self.cache is None:
            return
        shared = self.cache.shared.states
        last, start = self._last()
        position = position_ids if self.valid is None else position_ids.masked_fill(~self.valid, -1)
        newest = position[:, -1] if self.valid is None else self._newest(position, shared)
        shared["tokens"], shared["start"], shared["position"] = last[:, 0] + 1, start[:, 0], newest
        self.cache.plain = self.plain
        self.cache.advance(position_ids.shape[1])

    def _newest(self, position: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """Position of the last real token of each row."""
        last = position.gather(1, self.time.argmax(1, keepdim=True))[:, 0]
        known = shared.get("position", torch.full_like(last, -1))
        return torch.where(self.valid.any(1), last, known)  # type: ignore[union-attr]


def check_padding(attention_mask: Tensor | None, batch: int, length: int) -> None:
    """Raise ValueError unless the mask is None or covers `[batch, length]` tokens, earlier ones allowed."""
    if attention_mask is None:
        return
    if attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [batch, length] with 0 for padding; got {tuple(attention_mask.shape)}. "
            "For packed documents give restarting position_ids or cu_seqlens."
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must cover the {batch} x {length} tokens; got {tuple(attention_mask.shape)}.")


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    if attention_mask is None:
        return None
    valid = attention_mask[:, -length:].bool()
    return valid if torch.compiler.is_compiling() or not bool(valid.all()) else None


def _not_growing(position_ids: Tensor, valid: Tensor | None) -> Tensor:
    """`[B, T - 1]`: the position is not above that of the real token before."""
    if valid is None:
        return position_ids[:, 1:] <= position_ids[:, :-1]
    # The position of the latest real token up to each slot, found through its index.
    slots = torch.arange(position_ids.shape[1], device=position_ids.device)
    latest = torch.where(valid, slots, -1).cummax(1).values
    known = latest[:, :-1] >= 0
    previous = position_ids.gather(1, latest[:, :-1].clamp_min(0))
    return known & (position_ids[:, 1:] <= previous)
