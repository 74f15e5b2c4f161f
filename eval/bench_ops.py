"""The ops that the kernel benchmark measures: inputs, definitions, costs, peers. A new op is one entry of `OPS`."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spikelm.kernels.delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
    generalized_delta_rule,
    generalized_delta_rule_reference,
    generalized_delta_rule_step,
)
from spikelm.kernels.egru import egru, egru_step
from spikelm.kernels.egru_reference import egru_reference
from spikelm.kernels.event_linear import event_linear, event_linear_reference
from spikelm.kernels.gla import gla, gla_reference, gla_step
from spikelm.kernels.lif import lif, lif_step
from spikelm.kernels.lif_reference import lif_reference
from spikelm.kernels.linear_loss import linear_cross_entropy, linear_kl, linear_kl_reference
from spikelm.kernels.scan import scan, scan_reference, scan_step
from spikelm.kernels.simple_gla import simple_gla, simple_gla_reference, simple_gla_step
from spikelm.kernels.spike_encode import spike_encode, spike_encode_reference
from spikelm.kernels.spike_train import expand, expand_reference
from spikelm.kernels.weight_rows import GROUP, Rows, pack_rows
from spikelm.kernels.window_linear import window_linear, window_linear_step
from spikelm.kernels.window_linear_reference import window_linear_reference
from spikelm.kernels.window_linear_state import WindowState
from spikelm.kernels.wkv import EMPTY, wkv, wkv_reference, wkv_step


@dataclass(frozen=True)
class Sizes:
    """Batch, tokens, heads and channels per head; ops without heads have heads * width channels."""

    batch: int
    length: int
    heads: int
    width: int

    @property
    def channels(self) -> int:
        """Channels of a token over all heads."""
        return self.heads * self.width


@dataclass(frozen=True)
class Op:
    """One row of the benchmark.

    `make` draws inputs `[B, T, ...]`, the last `parameters` of them without batch and time; those from index `narrow`
    on stay float32 whatever the dtype, as models keep gates and parameters. Functions take the inputs and return a
    tensor or a tuple with the output first. `step` takes them without their time axis, and the last result's state.
    `flops` counts operations of a forward pass. `peers` map a name to (module, function of that module -> function of
    the inputs).
    """

    make: Callable[[Sizes, Callable[..., Tensor]], list[Tensor]]
    op: Callable[..., Any]
    reference: Callable[..., Any]
    flops: Callable[[Sizes], float]
    step: Callable[..., Any] | None = None
    state: Callable[[Sizes], tuple[int, ...]] | None = None
    differentiable: bool = True
    narrow: int = 3
    parameters: int = 0
    peers: dict[str, tuple[str, Callable[[Any], Callable[..., Any]]]] = field(default_factory=dict)


def _attention_inputs(gate_per_channel: bool) -> Callable[[Sizes, Callable[..., Tensor]], list[Tensor]]:
    def make(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
        q, k, v = (draw(s.batch, s.length, s.heads, s.width) for _ in range(3))
        g = draw(*k.shape) if gate_per_channel else draw(*k.shape[:3])
        return [q, k, v, -0.1 * g.abs()]

    return make


def _attention_flops(s: Sizes) -> float:
    return 4.0 * s.batch * s.length * s.heads * s.width**2


VOCABULARY = 49_152  # words of the losses of the output head; tokens are B * T


def _head_inputs(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
    x, weight = draw(s.batch, s.length, s.channels), draw(VOCABULARY, s.channels) / s.channels**0.5
    targets = (draw(s.batch, s.length).abs() * 1e4).long() % VOCABULARY
    return [x, targets, weight]


def _teacher_inputs(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
    return [draw(s.batch, s.length, s.channels), *(draw(VOCABULARY, s.channels) / s.channels**0.5 for _ in range(2))]


WINDOW = 64


def _window_inputs(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
    q, k, v, fq, fk = (draw(s.batch, s.length, s.heads, s.width) for _ in range(5))
    return [q, k, v, fq.softmax(-1), fk.softmax(-1), draw(s.heads).sigmoid()]


def _window_flops(s: Sizes) -> float:
    """Two products of a query with its window, an update and a product of the sums."""
    return 4.0 * s.batch * s.length * s.heads * s.width * (WINDOW + s.width)


def _windowed(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        o, state = function(*inputs, window=WINDOW)
        return o, *state

    return run


def _window_step(*inputs: Tensor) -> tuple[Tensor, ...]:
    """A step from a full window, whose parts are cut from one tensor [B, H, 3 (WINDOW - 1) + width + 1, width]."""
    *tokens, gamma, whole = inputs
    length = torch.full(whole.shape[:1], WINDOW, device=whole.device)
    keys, values, features, sums, norm = whole.split([WINDOW - 1] * 3 + [whole.shape[3], 1], 2)
    o, state = window_linear_step(*tokens, gamma, WindowState(keys, values, features, sums, norm.squeeze(2), length))
    return o, *state


def _gated_delta_inputs(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
    q, k, v = (draw(s.batch, s.length, s.heads, s.width) for _ in range(3))
    g, beta = (draw(s.batch, s.length, s.heads) for _ in range(2))
    return [q, F.normalize(k, dim=-1), v, -0.1 * g.abs(), beta.sigmoid()]


def _rwkv7_inputs(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
    r, w, k, v, erase, rate = (draw(s.batch, s.length, s.heads, s.width) for _ in range(6))
    erase = F.normalize(erase, dim=-1)
    return [r, k, v, -erase, erase * rate.sigmoid(), -0.6065 * w.sigmoid()]


def _decay_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of r, w, k, v, a, b as one of r, k, v, a, b, w: what stays float32 comes last in the benchmark."""
    return lambda r, k, v, a, b, w, *state: function(r, w, k, v, a, b, *state)


def _lif_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    params = torch.tensor([[0.5], [1.0]], device=x.device).expand(2, x.shape[-1])
    state = torch.zeros(x.shape[0], 1, x.shape[-1], device=x.device)
    return lif_reference(x, params, state, None, None, "hard", False, "atan", 1.0, True, 0)


def _spikingjelly(module: Any) -> Callable[[Tensor], Tensor]:
    """Its multi-step LIF with the same decay, reset and surrogate; time comes first there."""
    surrogate = importlib.import_module("spikingjelly.activation_based.surrogate")
    chooses = "backend" not in inspect.signature(module.LIFNode).parameters  # by itself, since 2.0

    def run(x: Tensor) -> Tensor:
        fastest = {"backend": "cupy"} if x.is_cuda and not chooses else {}
        node = module.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), v_reset=0.0, step_mode="m", **fastest)
        return node(x.transpose(0, 1)).transpose(0, 1)

    return run


def _fla_wkv(module: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], Any]:
    """It takes the logarithm of -w, and a state with an axis more."""

    def run(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Any:
        state = k.new_zeros(k.shape[0], 3, 1, k.shape[2], dtype=torch.float32)
        state[:, 2] = EMPTY
        return module.fused_recurrent_rwkv4((-w).log(), u, k, v, state)

    return run


def _events(silent: float) -> Op:
    """Counts with a share of zeros times int8 weights [4 C, C]; its peer is the same engine reading all weights.

    A token of a decoder: `--batch 1 --length 1`, and channels for which three sets of weights leave the cache.
    """

    def make(s: Sizes, draw: Callable[..., Tensor]) -> list[Tensor]:
        size = draw(s.batch, s.length, s.channels)
        counts = size.sign() * (3.0 * size.abs()).ceil()
        zero = draw(*size.shape).abs() < 2**0.5 * torch.erfinv(torch.tensor(silent))  # a share of a normal variable
        rows = pack_rows(draw(4 * s.channels, s.channels), "int8")
        return [counts.masked_fill(zero, 0.0), draw(s.batch, s.length, 1).abs() + 0.1, rows.data, rows.scales]

    def with_rows(function: Callable[..., Tensor], **options: bool) -> Callable[..., Tensor]:
        def run(counts: Tensor, threshold: Tensor, data: Tensor, scales: Tensor) -> Tensor:
            rows = Rows("int8", data, scales, GROUP, *data.shape)
            return function(counts, rows, threshold=threshold, **options)

        return run

    return Op(
        make,
        with_rows(event_linear),
        with_rows(event_linear_reference),
        lambda s: 8.0 * s.batch * s.length * s.channels**2 * (1.0 - silent),
        with_rows(event_linear),
        differentiable=False,
        narrow=0,
        parameters=2,
        peers={"dense": ("spikelm.kernels.event_linear", lambda m: with_rows(m.event_linear, dense=True))},
    )


OPS: dict[str, Op] = {
    "gla": Op(
        _attention_inputs(True),
        gla,
        gla_reference,
        _attention_flops,
        gla_step,
        lambda s: (s.batch, s.heads, s.width, s.width),
        peers={"fla": ("fla.ops.gla", lambda m: m.chunk_gla)},
    ),
    "simple_gla": Op(
        _attention_inputs(False),
        simple_gla,
        simple_gla_reference,
        _attention_flops,
        simple_gla_step,
        lambda s: (s.batch, s.heads, s.width, s.width),
        peers={"fla": ("fla.ops.simple_gla", lambda m: m.chunk_simple_gla)},
    ),
    "window_linear": Op(
        _window_inputs,
        _windowed(window_linear),
        _windowed(window_linear_reference),
        _window_flops,
        _window_step,
        lambda s: (s.batch, s.heads, 3 * (WINDOW - 1) + s.width + 1, s.width),
        narrow=5,
        parameters=1,
    ),
    "gated_delta": Op(
        _gated_delta_inputs,
        gated_delta_rule,
        gated_delta_rule_reference,
        lambda s: 2.0 * _attention_flops(s),
        gated_delta_rule_step,
        lambda s: (s.batch, s.heads, s.width, s.width),
        peers={"fla": ("fla.ops.gated_delta_rule", lambda m: m.chunk_gated_delta_rule)},
    ),
    "rwkv7": Op(
        _rwkv7_inputs,
        _decay_last(generalized_delta_rule),
        _decay_last(generalized_delta_rule_reference),
        lambda s: 2.0 * _attention_flops(s),
        _decay_last(generalized_delta_rule_step),
        lambda s: (s.batch, s.heads, s.width, s.width),
        narrow=5,
        peers={"fla": ("fla.ops.rwkv7", lambda m: _decay_last(m.chunk_rwkv7))},
    ),
    "scan": Op(
        lambda s, draw: [draw(s.batch, s.length, s.channels), draw(s.batch, s.length, s.channels).sigmoid()],
        scan,
        scan_reference,
        lambda s: 2.0 * s.batch * s.length * s.channels,
        scan_step,
        lambda s: (s.batch, s.channels),
        peers={"fla": ("fla.ops.hgrn", lambda m: lambda x, a: m.chunk_hgrn(x, a.log()))},
    ),
    "wkv": Op(
        lambda s, draw: [
            *(draw(s.batch, s.length, s.channels) for _ in "kv"),
            -draw(s.channels).exp(),
            draw(s.channels),
        ],
        wkv,
        wkv_reference,
        lambda s: 12.0 * s.batch * s.length * s.channels,
        wkv_step,
        lambda s: (s.batch, 3, s.channels),
        narrow=2,
        parameters=2,
        peers={"fla": ("fla.ops.rwkv4", _fla_wkv)},
    ),
    "linear_cross_entropy": Op(
        _head_inputs,
        lambda x, targets, weight: linear_cross_entropy(x, weight, targets),
        lambda x, targets, weight: F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten()),
        lambda s: 2.0 * s.batch * s.length * s.channels * VOCABULARY,
        parameters=1,
    ),
    "linear_kl": Op(
        _teacher_inputs,
        lambda x, weight, teacher_weight: linear_kl(x, weight, x.detach(), teacher_weight.detach()),
        lambda x, weight, teacher_weight: linear_kl_reference(x, weight, x.detach(), teacher_weight.detach()),
        lambda s: 4.0 * s.batch * s.length * s.channels * VOCABULARY,
        parameters=2,
    ),
    "lif": Op(
        lambda s, draw: [2.0 * draw(s.batch, s.length, s.channels)],
        lambda x: lif(x, 0.5, 1.0),
        _lif_reference,
        lambda s: 4.0 * s.batch * s.length * s.channels,
        lambda x, state: lif_step(x, 0.5, 1.0, state),
        lambda s: (s.batch, s.channels),
        peers={"spikingjelly": ("spikingjelly.activation_based.neuron", _spikingjelly)},
    ),
    "egru": Op(
        lambda s, draw: [
            draw(s.batch, s.length, 3 * s.channels),
            draw(s.heads, s.width, 3 * s.width) / s.width**0.5,
            0.1 * draw(s.channels).abs(),
        ],
        lambda a, weight, threshold: egru(a, weight, threshold, form="evnn"),
        lambda a, weight, threshold: egru_reference(a, weight, threshold, form="evnn"),
        lambda s: 6.0 * s.batch * s.length * s.channels * s.width,
        lambda a, weight, threshold, state: egru_step(a, weight, threshold, state, form="evnn"),
        lambda s: (s.batch, 2, s.channels),
        narrow=1,
        parameters=2,
    ),
    "spike_encode": Op(
        lambda s, draw: [draw(s.batch, s.length, s.channels)],
        lambda x: spike_encode(x, 3.0),
        lambda x: spike_encode_reference(x, torch.tensor([3.0], device=x.device), None, None, None),
        lambda s: 4.0 * s.batch * s.length * s.channels,
        differentiable=False,
    ),
    "spike_train": Op(
        lambda s, draw: [(3.0 * draw(s.batch, s.length, s.channels)).round().clamp(-7, 7)],
        lambda x: expand(x, "bitwise", 3),
        lambda x: expand_reference(x, "bitwise", 3),
        lambda s: 9.0 * s.batch * s.length * s.channels,
        differentiable=False,
    ),
    "event_linear": _events(0.7),
    **{f"event_linear_{percent}": _events(percent / 100) for percent in (0, 20, 40, 60, 80, 95)},
}
