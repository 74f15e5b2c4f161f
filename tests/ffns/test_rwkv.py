"""RWKV's channel mixers against straight re-statements; what they start as."""

import torch

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM


def inputs_and_outputs(name):
    model, seen = small_model(ffns=name, mixers="gla"), {}
    ffn = model.model.layers[1].ffn
    ffn.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], y=output[0]))
    with torch.no_grad():
        model(torch.randint(0, 97, (1, 11)))
    return ffn, seen["x"], seen["y"]


def test_rwkv_4():
    ffn, x, y = inputs_and_outputs("rwkv")
    for t in range(len(x)):
        before = x[t - 1] if t else torch.zeros_like(x[0])
        key = ffn.mix_key * x[t] + (1 - ffn.mix_key) * before
        receptance = ffn.mix_receptance * x[t] + (1 - ffn.mix_receptance) * before
        value = ffn.value_proj.weight @ torch.relu(ffn.key_proj.weight @ key) ** 2
        assert (torch.sigmoid(ffn.receptance_proj.weight @ receptance) * value - y[t]).abs().max() < 1e-9


def test_rwkv_7():
    ffn, x, y = inputs_and_outputs("rwkv7")
    for t in range(len(x)):
        before = x[t - 1] if t else torch.zeros_like(x[0])
        key = x[t] + (before - x[t]) * ffn.mix_key
        assert (ffn.value_proj.weight @ torch.relu(ffn.key_proj.weight @ key) ** 2 - y[t]).abs().max() < 1e-9


def test_initial_values_are_the_published_ones():
    ramp = torch.arange(32) / 32
    first, second = (layer.ffn for layer in SpikeLMForCausalLM(small_config(ffns="rwkv")).model.layers[:2])
    assert torch.allclose(first.mix_key, ramp) and torch.allclose(second.mix_receptance, ramp ** (2 / 3))
    assert not first.value_proj.weight.any() and not first.receptance_proj.weight.any()
    rows = first.key_proj.weight.T @ first.key_proj.weight  # orthogonal columns, gain sqrt(48 / 32)
    assert torch.allclose(rows, 1.5 * torch.eye(32), atol=1e-5)
    seventh = SpikeLMForCausalLM(small_config(ffns="rwkv7")).model.layers[1].ffn
    assert torch.allclose(seventh.mix_key, 1 - ramp ** ((2 / 3) ** 4))
    assert 0.9 < seventh.key_proj.weight.abs().max() / (0.5 / 32**0.5) <= 1 and not seventh.value_proj.weight.any()
