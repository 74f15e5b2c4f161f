"""A decoding step without avoidable Python: runs of plain layers, five prepared calls each.

    stream x -> [norm, code, q k v] -> [rotate, append, attend] -> [code, o, add to x]
             -> [norm, code, gate up] -> [gate, code, down, add to x]

Plain is what most converted models are made of: RMSNorm, full attention with plain heads, a SwiGLU ffn, sites that
code each token by itself or none. A run of such layers takes a token of at most eight texts without padding, in
float32 on the CPU; whatever else comes (a prompt, padding, documents, observers, hooks, other dtypes) goes through the
layers' own modules, which hold the same weights and share the same cache. Decisions of the code have the same bits on
the same values; norms and attention round differently, as prefill and decoding do anyway.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from spikelm.cache import Loan
from spikelm.ffns.gated import GatedFFN
from spikelm.inference.linears import EVENT_ROWS, EventProduct
from spikelm.kernels.attend import AttendCall
from spikelm.kernels.chain import Chain, PreparedCall
from spikelm.kernels.event_call import Code, EventCall, Norm
from spikelm.mixers.attention import SoftmaxCore
from spikelm.mixers.heads import HeadMixer
from spikelm.norms import OnePlusNorm, RMSNorm
from spikelm.spiking.site import NoSite, SpikeSite

if TYPE_CHECKING:
    from spikelm.cache import SpikeCache
    from spikelm.context import ForwardContext
    from spikelm.modeling import SpikeLMDecoderLayer

# With events="auto" a run looks at its counts once in so many tokens.
LOOK = 32
# Tokens that a run writes to a cache before it asks for room again.
ROOM = 64


def plain_runs(layers: list[Any]) -> list[Any]:
    """The layers of a prepared model in order, neighbours that are plain joined into a `LayerRun`."""
    joined: list[Any] = []
    for layer in layers:
        if not is_plain(layer):
            joined.append(layer)
        elif joined and isinstance(joined[-1], LayerRun):
            joined[-1].layers.append(layer)
        else:
            joined.append(LayerRun([layer]))
    return joined


def is_plain(layer: "SpikeLMDecoderLayer") -> bool:
    """Whether the prepared calls compute what this layer computes."""
    mixer, ffn = layer.mixer, layer.ffn
    if type(mixer) is not HeadMixer or type(ffn) is not GatedFFN or len(mixer.core_names) > 1:
        return False
    core = _core(layer)
    norms = (layer.mixer_norm, layer.ffn_norm)
    posts = (layer.mixer_post_norm, layer.ffn_post_norm)
    outputs = (layer.mixer_out_site, layer.ffn_out_site)
    sites = (mixer.qkv_site, mixer.o_site, ffn.gate_up_site, ffn.down_site)
    return (
        layer.residual
        and type(core) is SoftmaxCore
        and core.window is None
        and core.rope != "none"
        and not (core.softcap or core.query_k is not None or core.int8_keys_values)
        and mixer.qk_norm == "none"
        and isinstance(ffn.act, (SiLUActivation, nn.SiLU))
        and all(type(norm) in (RMSNorm, OnePlusNorm) for norm in norms)
        and all(isinstance(post, nn.Identity) for post in posts)
        and all(isinstance(site, NoSite) for site in outputs)
        and all(type(site) in (SpikeSite, NoSite) for site in sites)
        and all(len(product.widths) == n for product, n in zip(_products(layer), (3, 1, 2, 1)))
    )


def _products(layer: Any) -> tuple[EventProduct, ...]:
    """The products of q k v, o, gate up and down."""
    readers = (layer.mixer.q_proj, layer.mixer.o_proj, layer.ffn.gate_proj, layer.ffn.down_proj)
    return tuple(reader.product for reader in readers)


class Switch:
    """One product of a run, as the prepared call that skips what is silent or the one that reads all.

    Attributes:
        call: the prepared call. With events="auto" it is chosen anew by `look`.
    """

    def __init__(self, product: EventProduct, x: Tensor, y: Tensor, **options: Any):
        site, events = product.site, product.events
        code = None
        if site is not None:
            code = Code(site.k, site.dead_zone, site.magnitude, site.max_count, site.rectify)
        self.calls = {
            dense: EventCall(product.packed, x, y, bias=product.bias, code=code, dense=dense, **options)
            for dense in (False, True)
            if events == "auto" or dense == (events == "never")
        }
        self.call = next(iter(self.calls.values()))
        self.most_active = product.most_active.get(x.shape[0], 0.0) * product.inputs

    def look(self) -> bool:
        """Choose by the inputs that were active in the latest call; whether the choice is a new one."""
        if len(self.calls) == 1 or self.call.counts is None:
            return False
        before, active = self.call, int(self.call.counts.abs().amax(0).count_nonzero())
        self.call = self.calls[active > self.most_active]
        return self.call is not before


class _Step:
    """The calls of one layer for a batch of one size, between buffers that all layers share."""

    def __init__(self, layer: Any, buffers: dict[str, Tensor]):
        core = _core(layer)
        qkv, o, gate_up, down = _products(layer)
        self.layer_idx = core.layer_idx
        self.growing = (f"{core.state_path}.keys", f"{core.state_path}.values")
        stream, inner = buffers["stream"], buffers[f"inner.{gate_up.outputs}"]
        tables = buffers[f"cos.{core.rope}"], buffers[f"sin.{core.rope}"], buffers["length"]
        heads, shared, _ = core.config.head_shape
        self.qkv = Switch(qkv, stream, buffers["qkv"], norm=_norm(layer.mixer_norm))
        self.attend = AttendCall(
            buffers["qkv"], buffers["heads"], *tables, queries=heads, shared=shared, scale=core.scaling
        )
        self.o = Switch(o, buffers["heads"], stream, add=True)
        self.gate_up = Switch(gate_up, stream, inner, norm=_norm(layer.ffn_norm))
        self.down = Switch(down, inner, stream, gated=True, add=True)
        self.switches = (self.qkv, self.o, self.gate_up, self.down)
        self.loan = Loan(self.growing, 0)

    @property
    def calls(self) -> list[PreparedCall]:
        """In order."""
        return [self.qkv.call, self.attend, self.o.call, self.gate_up.call, self.down.call]


class _Prepared:
    """A run's calls for a batch of one size.

    Attributes:
        buffers: what calls read and write, by name. steps: one for each layer. chain: all their calls.
        left: tokens that fit in the buffers of the cache that it writes to.
    """

    def __init__(self, layers: list[Any], batch: int, rope: dict[str, tuple[Tensor, Tensor]]):
        widths = {"stream": layers[0].mixer.q_proj.in_features}
        for layer in layers:
            qkv, o, gate_up, _ = _products(layer)
            widths |= {"qkv": qkv.outputs, "heads": o.inputs, f"inner.{gate_up.outputs}": gate_up.outputs}
        for name, (cos, _) in rope.items():
            widths |= {f"cos.{name}": cos.shape[2], f"sin.{name}": cos.shape[2]}
        self.buffers = {name: torch.zeros(batch, width) for name, width in widths.items()}
        self.buffers["length"] = torch.zeros(1, dtype=torch.int64)
        self.steps = [_Step(layer, self.buffers) for layer in layers]
        self.chain = self._chain()
        self.left = 0
        self._tokens = 0

    def _chain(self) -> Chain:
        return Chain([call for step in self.steps for call in step.calls])

    def goes_on(self, cache: "SpikeCache") -> bool:
        """Whether the buffers are still those of this cache, untouched by others, with room."""
        return self.left > 0 and all(cache.layers[s.layer_idx].lent_to(s.loan) for s in self.steps)

    def borrow(self, cache: "SpikeCache") -> None:
        """Write behind the keys and values of this cache from now on."""
        for step in self.steps:
            states = cache.layers[step.layer_idx]
            length = states.states[step.growing[0]].shape[2]
            step.loan = Loan(step.growing, ROOM)
            step.attend.place(*states.lend(step.loan))
        self.buffers["length"].fill_(length)
        self.left = ROOM

    def token(self) -> None:
        """Run the chain on what lies in the buffers."""
        self.chain()
        self.buffers["length"] += 1
        self.left -= 1
        for step in self.steps:
            step.loan.written += 1
        self._tokens += 1
        if self._tokens % LOOK == 1 and [s for step in self.steps for s in step.switches if s.look()]:
            self.chain = self._chain()


class LayerRun:
    """Neighbouring plain layers of a prepared model: called as a layer is."""

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self.forget()

    def __reduce__(self) -> tuple:
        return LayerRun, (self.layers,)  # prepared calls hold addresses: a copy makes its own

    def forget(self) -> None:
        """Drop the prepared calls, as when tensors have moved."""
        self.prepared: dict[int, _Prepared] = {}
        modules = [module for layer in self.layers for module in layer.modules()]
        self._sites = [module for module in modules if isinstance(module, SpikeSite)]
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._watchers = [*hooks, *(site.observers for site in self._sites)]

    def __call__(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """`[B, T, hidden]` -> the same shape."""
        cache = context.cache
        if cache is None or not self._takes(x, context):
            return self._through(x, context)
        if x.shape[0] not in self.prepared:
            self.prepared[x.shape[0]] = _Prepared(self.layers, x.shape[0], context.rope)
        prepared = self.prepared[x.shape[0]]
        if not prepared.goes_on(cache):
            if prepared.steps[0].growing[0] not in cache.layers[prepared.steps[0].layer_idx].states:
                return self._through(x, context)
            prepared.borrow(cache)
        buffers = prepared.buffers
        buffers["stream"].copy_(x[:, 0])
        for name, (cos, sin) in context.rope.items():
            buffers[f"cos.{name}"].copy_(cos[:, 0])
            buffers[f"sin.{name}"].copy_(sin[:, 0])
        prepared.token()
        context.keys()  # the times of the keys grow with the keys
        return buffers["stream"][:, None].clone()

    def _through(self, x: Tensor, context: "ForwardContext") -> Tensor:
        for layer in self.layers:
            x = layer(x, context=context)
        return x

    def _takes(self, x: Tensor, context: "ForwardContext") -> bool:
        """Whether this is one token of a few texts, and nobody watches or changes what happens inside."""
        if x.shape[1] != 1 or x.shape[0] > EVENT_ROWS or x.dtype != torch.float32 or x.device.type != "cpu":
            return False
        if not context.plain or x.requires_grad or torch.is_autocast_enabled("cpu"):
            return False
        return not any(self._watchers) and all(site.substitute is None for site in self._sites)


def _core(layer: Any) -> SoftmaxCore:
    return getattr(layer.mixer, layer.mixer.core_names[0])


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps, type(norm) is OnePlusNorm)
