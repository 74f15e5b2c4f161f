"""Mixers that work on heads: q, k, v projections, one or two cores that mix heads over time, an output projection.

    x -> [qkv site] -> q, k, v -> core(s) -> heads -> [o site] -> o

A core (`SoftmaxCore`, `GatedLinearCore`, ...) sees q `[B, T, H, D]`, k and v `[B, T, Hkv, D]` before any rotation and
returns heads `[B, T, H, D]`. It says whether its output is normed already (`normalises`) and which linears of its own
read the layer's input (`input_readers`). Two cores side by side share the projections; each has its own output norm,
and the normed heads are added (SpikingBrain-76B, section 1.3). With `parallel_norms: linear` a softmax core's heads
are added as they are, to those of a linear core whose norm starts from 0.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from spikelm.initial import declare
from spikelm.norms import make_norm
from spikelm.spiking.site import NoSite, make_site

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig
    from spikelm.context import ForwardContext


class HeadMixer(nn.Module):
    """`[B, T, hidden]` -> `[B, T, hidden]` through `cores`; sites `qkv` and `o`.

    Args:
        config, layer_idx: the model's configuration and the layer's index.
        cores: name -> core, e.g. `{"gla": GatedLinearCore(...), "swa": SoftmaxCore(...)}`.
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, cores: dict[str, nn.Module]):
        super().__init__()
        heads, shared_heads, self.head_dim = config.head_shape
        query, shared = heads * self.head_dim, shared_heads * self.head_dim
        bias = config.at("attention_bias", layer_idx)
        self.qkv_site = make_site(config, layer_idx, "qkv", config.hidden_size)
        self.q_proj = nn.Linear(config.hidden_size, query, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=bias)
        # q and k are normed with the model's own kind of norm: over each head, or across all heads at once.
        self.qk_norm = config.at("attention_qk_norm", layer_idx)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = make_norm(config.final_norm, self.head_dim if per_head else query, config.norm_eps)
            self.k_norm = make_norm(config.final_norm, self.head_dim if per_head else shared, config.norm_eps)
        for name, core in cores.items():
            self.add_module(name, core)
        self.core_names = tuple(cores)
        if len(cores) > 1 and config.at("parallel_norms", layer_idx) == "linear":
            self.branch_norms = nn.ModuleDict()
            for core in cores.values():
                if core.normalises:
                    declare(core.norm, weight=0.0)
        elif len(cores) > 1:
            self.branch_norms = nn.ModuleDict(
                {
                    name: make_norm("rmsnorm", self.head_dim, config.norm_eps)
                    for name, core in cores.items()
                    if not core.normalises
                }
            )
        self.o_site = make_site(config, layer_idx, "o", query)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.at("attention_output_bias", layer_idx))
        gates = [f"{name}.{reader}" for name, core in cores.items() for reader in core.input_readers]
        self.site_readers = {"qkv_site": ("q_proj", "k_proj", "v_proj", *gates), "o_site": ("o_proj",)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """Mix tokens over time."""
        x = self.qkv_site(x, context)
        q, k, v = self._heads(x)
        mixed = [self._branch(name, q, k, v, x, context) for name in self.core_names]
        heads = mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]
        return self.o_proj(self.o_site(heads.flatten(2), context))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _branch(self, name: str, q: Tensor, k: Tensor, v: Tensor, x: Tensor, context: "ForwardContext") -> Tensor:
        heads = getattr(self, name)(q, k, v, x, context)[0]
        if len(self.core_names) > 1 and name in self.branch_norms:
            heads = self.branch_norms[name](heads)
        return heads


class ParallelMixer(nn.Module):
    """Two whole mixers side by side, each with its own projections and its own output norm; the sum goes on.

    The input is spike-coded once for both, unless one of them codes something else (RWKV: shifted inputs).
    """

    def __init__(self, config: "SpikeLMConfig", layer_idx: int, branches: dict[str, nn.Module]):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.norms = nn.ModuleDict(
            {name: make_norm("rmsnorm", config.hidden_size, config.norm_eps) for name in branches}
        )
        self.qkv_site: nn.Module = NoSite()
        readers: list[str] = []
        if all("qkv_site" in branch.site_readers for branch in branches.values()):
            self.qkv_site = make_site(config, layer_idx, "qkv", config.hidden_size)
            for name, branch in branches.items():
                own = dict(branch.site_readers)
                readers += [f"branches.{name}.{reader}" for reader in own.pop("qkv_site")]
                branch.site_readers, branch.qkv_site = own, NoSite()  # coded once, here
        self.site_readers = {"qkv_site": tuple(readers)}

    def forward(self, x: Tensor, context: "ForwardContext") -> Tensor:
        """`[B, T, hidden]` -> `[B, T, hidden]`."""
        x = self.qkv_site(x, context)
        first, second = (self.norms[name](branch(x, context)) for name, branch in self.branches.items())
        return first + second
