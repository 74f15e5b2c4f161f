"""Token mixers by name. A new one is a file, a line here, and a test file."""

from typing import TYPE_CHECKING

from torch import nn

from spikelm.mixers.attention import SoftmaxCore
from spikelm.mixers.delta import DeltaCore
from spikelm.mixers.egru import EGRU, EGRUStack
from spikelm.mixers.gla import GatedLinearCore
from spikelm.mixers.heads import HeadMixer, ParallelMixer
from spikelm.mixers.retention import RetentionCore
from spikelm.mixers.rwkv4 import RWKV4
from spikelm.mixers.rwkv7 import RWKV7
from spikelm.mixers.scans import HGRN, MinGRU
from spikelm.mixers.window_linear import WindowLinearCore

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig

# Mixers of heads, between q, k, v and o projections that two of them may share.
CORES = {
    "attention": lambda config, layer_idx: SoftmaxCore(config, layer_idx, windowed=False),
    "swa": lambda config, layer_idx: SoftmaxCore(config, layer_idx, windowed=True),
    "gla": GatedLinearCore,
    "retention": RetentionCore,
    "window_linear": WindowLinearCore,
    "delta": DeltaCore,
}
# Mixers with projections of their own kind.
MIXERS = {"rwkv4": RWKV4, "rwkv7": RWKV7, "hgrn": HGRN, "mingru": MinGRU, "egru": EGRU, "egru_stack": EGRUStack}


def make_mixer(config: "SpikeLMConfig", layer_idx: int) -> nn.Module:
    """The token mixer that `config.mixers` names for a layer; `a+b` puts two side by side."""
    names = config.mixers[layer_idx].split("+")
    shared = config.at("parallel_shared_projections", layer_idx)
    if len(names) > 1 and shared and all(name in CORES for name in names):
        return HeadMixer(config, layer_idx, {name: CORES[name](config, layer_idx) for name in names})
    branches = {name: _make_one(config, layer_idx, name) for name in names}
    return branches[names[0]] if len(names) == 1 else ParallelMixer(config, layer_idx, branches)


def _make_one(config: "SpikeLMConfig", layer_idx: int, name: str) -> nn.Module:
    if name in CORES:
        return HeadMixer(config, layer_idx, {name: CORES[name](config, layer_idx)})
    return MIXERS[name](config, layer_idx)
