"""Token mixers by name. A new one is a file, a line here, and a test file."""

from typing import TYPE_CHECKING

from torch import nn

from spikelm.mixers.attention import SoftmaxCore
from spikelm.mixers.gla import GatedLinearCore
from spikelm.mixers.heads import HeadMixer, ParallelMixer

if TYPE_CHECKING:
    from spikelm.configuration import SpikeLMConfig

CORES = {
    "attention": lambda config, layer_idx: SoftmaxCore(config, layer_idx, windowed=False),
    "swa": lambda config, layer_idx: SoftmaxCore(config, layer_idx, windowed=True),
    "gla": GatedLinearCore,
}


def make_mixer(config: "SpikeLMConfig", layer_idx: int) -> nn.Module:
    """The token mixer that `config.mixers` names for a layer; `a+b` puts two side by side."""
    names = config.mixers[layer_idx].split("+")
    cores = {name: CORES[name](config, layer_idx) for name in names}
    if len(cores) == 1 or config.at("parallel_shared_projections", layer_idx):
        return HeadMixer(config, layer_idx, cores)
    branches = {name: HeadMixer(config, layer_idx, {name: core}) for name, core in cores.items()}
    return ParallelMixer(config, layer_idx, branches)
