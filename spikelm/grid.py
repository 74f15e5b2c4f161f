"""Weights on a grid: integer codes times one float32 scale for every row and group of G input channels.

    W[o, i] = scale[o, i // G] c[o, i]                               (SpikingBrain-7B-W8ASpike, section 6.4: G = 128)

A linear whose weights lie on a grid is an ordinary linear. Behind a spike site, which hands on V s, its product is a
sum of integers, scaled once per group:

    y[o] = b[o] + V sum_g scale[o, g] sum_{i in g} s[i] c[o, i]

Codes are int16: about 1 % of W8ASpike's lie outside int8 (section 2.3).
"""

import torch
from torch import Tensor, nn

from spikelm.precision import KeepsDtype

LARGEST_CODE = torch.iinfo(torch.int16).max


class WeightGrid(KeepsDtype):
    """The grid of a linear's weights: `scales` `[out, in / G]`, float32 whatever the dtype of the model.

    Raises:
        ValueError: the input channels do not divide into groups of G.
    """

    def __init__(self, linear: nn.Linear, group_size: int, name: str):
        super().__init__()
        if linear.in_features % group_size:
            raise ValueError(
                f"weight_group_size ({group_size}) must divide the input channels of every linear; {name} has "
                f"{linear.in_features}."
            )
        self.scales: Tensor
        self.initial = {"scales": 1.0}
        groups = linear.in_features // group_size
        self.register_buffer("scales", torch.ones(linear.out_features, groups, dtype=torch.float32))


def add_grids(module: nn.Module, group_size: int) -> None:
    """Give every linear inside `module` its `grid`, with scales of one until a checkpoint fills them."""
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear):
            linear.grid = WeightGrid(linear, group_size, name)


def weight_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """Nearest codes `[out, in]`, integers held as float32, of a weight `[out, in]` on a grid `[out, in / G]`.

    Raises:
        ValueError: a scale that is not positive and finite, or a code beyond int16.
    """
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError("its scales must be positive and finite.")
    groups = weight.float().unflatten(1, (scales.shape[1], -1))
    codes = (groups / scales[..., None]).round().flatten(1)
    if (largest := float(codes.abs().max())) > LARGEST_CODE:
        raise ValueError(f"its largest code is {largest:.0f}; expected at most {LARGEST_CODE} scales of its group.")
    return codes


def on_grid(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight `[out, in]` of codes `[out, in]` on a grid `[out, in / G]`, one rounding for each product."""
    return (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def codes_of(linear: nn.Linear) -> Tensor:
    """The int16 codes `[out, in]` of a linear whose weights lie on its grid; `on_grid` gives the weights back exactly.

    Raises:
        ValueError: it has no grid, or its weights have left it (by training, or by a dtype below float32).
    """
    grid = getattr(linear, "grid", None)
    if grid is None:
        raise ValueError("The linear has no grid; expected one of a model with weight_group_size.")
    codes = weight_codes(linear.weight.detach(), grid.scales)
    if not torch.equal(on_grid(codes, grid.scales), linear.weight.detach().float()):
        raise ValueError(
            "The linear's weights do not lie on its grid: they were trained, or rounded to another dtype, or never "
            "quantised. Load the model in float32, or quantise them anew."
        )
    return codes.to(torch.int16)
