"""A differentiable rate of spikes, to be paid for in training.

At a site with activation x, mean magnitude m and dead zone d (what rounds to zero, |x| < m / 2k, is silent as well) an
input is active where |x| / m >= max(d, 1 / 2k). With a soft step of width w in place of the comparison,

    rate_t = sum over sites of F sum_c sigmoid((|x_tc| / m_t - d_c) / w)  /  sum over sites of F C

is the share of reads that token t makes (F: weights that one input is multiplied with). Its gradient reaches x through
|x| and through m: larger activations alone change nothing, only how a token spreads over its channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from spikelm.kernels.runtime import wide_dtype
from spikelm.spiking.site import SpikeSite, spike_groups


@dataclass(eq=False)
class RateRegulariser(TrainerCallback):
    """Adds `weight` times the rate of a token to its loss; a recipe's trainer asks for `loss_terms`.

    Args:
        weight: nats per token and unit of rate. width: of the soft step, in mean magnitudes.

    Raises:
        ValueError: `weight` or `width` not above 0; when training begins: a model without sites that code each token
            by itself in front of linears.
    """

    weight: float
    width: float = 0.1

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.width <= 0:
            raise ValueError(f"weight and width must be above 0; got {self.weight} and {self.width}.")
        self._hooks: list[Any] = []
        self._rates: dict[SpikeSite, Tensor] = {}  # of the newest forward pass, `[B, T]`

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Watch the sites."""
        self._remove()  # of a training that an error ended
        groups = [group for group in spike_groups(model) if type(group.site) is SpikeSite and group.fan_out]
        if not groups:
            raise ValueError(
                "The model has no sites that code each token by itself, so there is no rate to regularise."
            )
        reads = sum(group.fan_out * group.site.width for group in groups)
        # Hooks stay for the whole training: activation checkpointing must meet the same operations twice.
        self._hooks = [group.site.register_forward_pre_hook(self._reader(group.fan_out / reads)) for group in groups]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the sites as they were."""
        self._remove()

    def loss_terms(self, counts: Tensor) -> dict[str, Tensor]:
        """`weight` times the rates of the last forward pass, summed over the tokens `counts` `[B, T]` bool."""
        rate = torch.stack([*self._rates.values()]).sum(0)
        self._rates.clear()
        return {"rate": self.weight * rate[counts].sum()}

    def _reader(self, share: float) -> Callable[..., None]:
        def read(site: SpikeSite, inputs: tuple[Any, ...]) -> None:
            if site.training and torch.is_grad_enabled():
                self._rates[site] = share * soft_active(site, inputs[0], self.width).sum(-1)

        return read

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._rates.clear()


def soft_active(site: SpikeSite, x: Tensor, width: float) -> Tensor:
    """How active each input of `[..., width of the site]` is, from 0 to 1; float32 or better, differentiable."""
    size = (x.relu() if site.rectify else x.abs()).to(wide_dtype(x))
    mean = size.mean(-1, keepdim=True) if site.magnitude is None else site.magnitude.to(size.dtype)
    zone = site.dead_zone.maximum(0.5 / site.k).to(size.dtype)
    return torch.sigmoid((size / mean.clamp_min(torch.finfo(size.dtype).tiny) - zone) / width)
