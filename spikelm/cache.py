"""Named per-layer states, and the cache that holds them during generation.

A module at any depth of a decoder layer declares its states (`Stateful.state_specs`); the cache stores them by layer
and name, whatever they are: recurrent matrices, windows of keys and values, membranes. Batch is always dimension 0,
so that reordering, repeating, selecting, resetting and saving are written once.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext

# What transformers calls the cache in arguments and outputs: "cache" since 5.24, "past_key_values" before.
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


@dataclass(frozen=True)
class StateSpec:
    """Shape of a state without its batch dimension (`None`: grows with the text) and its dtype.

    A dtype of None means that of the activations.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Loan:
    """Growing states of a cache layer that a decoder writes behind without storing every token.

    Attributes:
        names: of the states. slots: room that is asked for. written: slots that were filled.
    """

    names: tuple[str, ...]
    slots: int
    written: int = 0


class Stateful:
    """Mixin for modules that carry named states from one forward pass to the next."""

    layer_idx: int
    state_path: str = ""  # the module's path inside its decoder layer; set by the layer

    def state_specs(self) -> dict[str, StateSpec]:
        """Name, shape and dtype of every state."""
        raise TypeError(f"{type(self).__name__} is Stateful but declares no states.")

    def read_state(self, context: "ForwardContext", name: str) -> Tensor | None:
        """The stored state `[B, ...]`, or None at the start of a text or without a cache."""
        if context.cache is None:
            return None
        return context.cache.layers[self.layer_idx].states.get(f"{self.state_path}.{name}")

    def write_state(self, context: "ForwardContext", name: str, value: Tensor) -> None:
        """Store a state `[B, ...]`; nothing happens without a cache."""
        if context.cache is not None:
            context.cache.layers[self.layer_idx].states[f"{self.state_path}.{name}"] = value.detach()

    def extend_state(self, context: "ForwardContext", name: str, value: Tensor) -> Tensor:
        """A state `[B, H, L, D]` with `value` `[B, H, T, D]` behind it; stored, without copies while room is left."""
        if context.cache is None:
            return value
        return context.cache.layers[self.layer_idx].extend(f"{self.state_path}.{name}", value)


class StateLayer(CacheLayerMixin):
    """The states of one decoder layer, by name: `{"mixer.gla.recurrent": [B, H, K, V], ...}`."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[str, Tensor] = {}
        self.seen = 0  # slots of text, padding included
        # Growing states begin a larger buffer: name -> (buffer, the state as it was last stored).
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}
        self._loan: Loan | None = None

    @property
    def states(self) -> dict[str, Tensor]:
        """All states by name. A decoder that writes behind some of them loses its loan by this look."""
        self._end_loan()
        return self._states

    def _end_loan(self) -> None:
        """What a decoder has written behind the states joins them."""
        if (loan := self._loan) is not None:
            self._loan = None
            for name in loan.names:
                self.grow(name, loan.written)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """States appear when they are first written; there is nothing to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not how states are written here: raises TypeError."""
        raise TypeError("A spikelm cache layer holds named states; modules write them with Stateful.write_state.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask over all slots."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Slots of text seen so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """States stay where they are."""

    def prefetch(self) -> None:
        """States stay where they are."""

    def extend(self, name: str, value: Tensor) -> Tensor:
        """The state `name` `[B, H, L, D]` with `value` behind it, from now on the state."""
        if name not in self.states:
            self.states[name] = value.detach()
            return value
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            joined = torch.cat([self.states[name], value], 2)
            self.states[name] = joined.detach()
            return joined
        length = self.states[name].shape[2]
        self.reserve(name, value.shape[2])[:, :, length : length + value.shape[2]] = value
        return self.grow(name, value.shape[2])

    def reserve(self, name: str, more: int) -> Tensor:
        """A buffer `[B, H, capacity, D]` that the state `name` begins, with room for `more` slots behind it.

        Only a state that this layer grew itself is written behind: one that came from elsewhere, as after loading or
        reordering, may share its memory, and is copied first.
        """
        state = self._states[name]
        room, stored = self._rooms.get(name, (state, None))
        length = state.shape[2]
        if stored is not state or room.shape[2] < length + more:
            # A quarter more at a time, so that a text of n tokens copies about 4 n slots in all.
            capacity = -(-(length + more + length // 4) // 64) * 64
            room = state.new_empty(*state.shape[:2], capacity, state.shape[3])
            room[:, :, :length] = state
            self._rooms[name] = room, state
        return room

    def grow(self, name: str, more: int) -> Tensor:
        """The state `name` with `more` slots of its buffer, which somebody has written."""
        room = self._rooms[name][0]
        state = self._states[name] = room[:, :, : self._states[name].shape[2] + more]
        self._rooms[name] = room, state
        return state

    def lend(self, loan: "Loan") -> list[Tensor]:
        """The buffers of growing states, with room for `loan.slots`, for a decoder that writes behind them by itself.

        It counts `loan.written` up, and may go on as long as `lent_to(loan)`.
        """
        self._end_loan()
        rooms = [self.reserve(name, loan.slots) for name in loan.names]
        self._loan = loan
        return rooms

    def lent_to(self, loan: "Loan") -> bool:
        """Whether nobody has looked at the states since."""
        return self._loan is loan

    def reset(self) -> None:
        """Forget all states."""
        self.states.clear()
        self._rooms.clear()
        self.seen = 0

    def map_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every state by `change(state)`."""
        self._states = {name: change(value) for name, value in self.states.items()}
        self._rooms.clear()


class SpikeCache(Cache):
    """All states of a model, by layer, and what the layers share (`shared`: token counts, times of cached keys).

    `generate` makes one by itself; make one by hand to continue a text: `SpikeCache(model.config)`.
    """

    def __init__(self, config: "SpikeLMConfig"):
        super().__init__(layers=[StateLayer() for _ in range(config.num_hidden_layers)])
        self.shared = StateLayer()
        self.plain = True  # no padding and no document boundary so far

    def __repr__(self) -> str:
        return f"SpikeCache(layers={len(self.layers)}, seen={self.shared.seen}, bytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes that all states take."""
        return sum(t.numel() * t.element_size() for layer in self._all() for t in layer.states.values())

    @property
    def is_compileable(self) -> bool:
        """False: states are replaced, not written in place."""
        return False

    def _all(self) -> list[StateLayer]:
        return [*self.layers, self.shared]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots of text seen so far, padding included."""
        return self.shared.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of a mask over all slots."""
        return self.shared.get_mask_sizes(query_length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any text was seen."""
        return self.shared.seen > 0

    def advance(self, slots: int) -> None:
        """Count `slots` more slots; the model calls it once at the end of a forward pass."""
        for layer in self._all():
            layer.seen += slots

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._all():
            layer.reset()
        self.plain = True

    def crop(self, max_length: int) -> None:
        """Impossible: a recurrent state cannot go back. Raises ValueError."""
        raise ValueError("A cache with recurrent states cannot be cropped; start again from an empty SpikeCache.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`, in every state."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a mask), in that order."""
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self._all():
            layer.map_(change)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later, as plain tensors and numbers; `torch.save` it."""
        states = {f"layers.{i}.{n}": _alone(t) for i, layer in enumerate(self.layers) for n, t in layer.states.items()}
        states |= {f"shared.{n}": t for n, t in self.shared.states.items()}
        return {"states": states, "seen": self.shared.seen, "plain": self.plain}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError if a state belongs to a layer that is not here."""
        self.reset()
        for name, value in saved["states"].items():
            owner, _, rest = name.partition(".")
            if owner == "layers":
                index, _, rest = rest.partition(".")
                if int(index) >= len(self.layers):
                    raise ValueError(f"State {name} needs layer {index}, but this cache has {len(self.layers)} layers.")
                self.layers[int(index)].states[rest] = value
            else:
                self.shared.states[rest] = value
        self.plain = saved["plain"]
        self.advance(saved["seen"])


def _alone(state: Tensor) -> Tensor:
    """The state without the room behind it, which saving would write too."""
    return state if state.untyped_storage().nbytes() == state.nbytes else state.clone()
