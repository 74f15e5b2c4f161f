"""Weights on a grid of codes and scales."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.grid import add_grids, codes_of, on_grid, weight_codes


def linear(codes, scales):
    """A linear `[3, 8]` with two groups of 4 channels whose weights are codes times scales."""
    module = nn.Sequential(nn.Linear(8, 3))
    add_grids(module, 4)
    module[0].grid.scales.copy_(scales)
    module[0].weight.data = on_grid(codes, scales)
    return module[0]


def test_codes_come_back_exactly():
    codes = torch.randint(-300, 300, (3, 8))
    scales = torch.rand(3, 2) * 1e-3 + 1e-6
    codes[0, 0] = 32767
    assert torch.equal(codes_of(linear(codes, scales)).long(), codes)


def test_a_group_is_neighbouring_channels():
    weight = on_grid(torch.ones(1, 6), torch.tensor([[1.0, 2.0, 3.0]]))
    assert weight.tolist() == [[1, 1, 2, 2, 3, 3]]


def test_halves_go_to_the_even_code():
    assert weight_codes(torch.tensor([[0.5, 1.5, -0.5, -2.5]]), torch.ones(1, 1)).tolist() == [[0, 2, 0, -2]]


def test_weights_that_left_the_grid_have_no_codes():
    module = linear(torch.randint(-100, 100, (3, 8)), torch.full((3, 2), 0.1))
    module.weight.data[1, 2] += 1e-3
    with pytest.raises(ValueError, match="do not lie on its grid"):
        codes_of(module)
    with pytest.raises(ValueError, match="has no grid"):
        codes_of(nn.Linear(3, 3))


def test_every_linear_of_a_layer_has_a_grid_and_stays_a_linear():
    plain = SpikeLMForCausalLM(small_config(mixers="gla", gla_gate="dense"))
    model = SpikeLMForCausalLM(small_config(mixers="gla", gla_gate="dense", weight_group_size=16))
    added = set(model.state_dict()) - set(plain.state_dict())
    linears = {name for name, module in plain.model.named_modules(prefix="model") if type(module) is nn.Linear}
    assert added == {f"{name}.grid.scales" for name in linears} and len(added) == 3 * 8
    model.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"weight_group_size \(20\) must divide .* mixer.q_proj has 32"):
        small_model(weight_group_size=20)
    with pytest.raises(StrictDataclassClassValidationError, match="weight_group_size must be a positive"):
        small_config(weight_group_size=0)
