"""RWKV-7's mixer against a straight re-statement: two layers, the second with the values of the first."""

import math

import pytest
import torch

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM


def restated(mixer, x, first_values):
    """x `[T, C]` -> out `[T, C]`, values `[T, C]`; heads of 8."""
    heads, own, out = 4, {name: tensor.double() for name, tensor in mixer.channels.named_parameters()}, []
    state, values = torch.zeros(heads, 8, 8, dtype=x.dtype), []
    for t in range(len(x)):
        xx = (x[t - 1] if t else torch.zeros_like(x[0])) - x[t]
        r_in, w_in, k_in, v_in, a_in, g_in = (x[t] + xx * getattr(mixer, f"mix_{z}") for z in "rwkvag")

        def low_rank(module, z, act=lambda y: y):
            return module[1].weight @ act(module[0].weight @ z)

        r, k, v = mixer.r_proj.weight @ r_in, mixer.k_proj.weight @ k_in, mixer.v_proj.weight @ v_in
        d = torch.exp(-math.exp(-0.5) * torch.sigmoid(own["decay"] + low_rank(mixer.decay, w_in, torch.tanh)))
        a = torch.sigmoid(own["rate"] + low_rank(mixer.rate, a_in))
        g = low_rank(mixer.gate, g_in, torch.sigmoid)
        if first_values is not None:
            v = v + (first_values[t] - v) * torch.sigmoid(own["value"] + low_rank(mixer.value, v_in))
        values.append(v)
        kk, k = k * own["erase"], k * (1 + (a - 1) * own["write"])
        y = torch.zeros(heads, 8, dtype=x.dtype)
        bonus = torch.zeros(heads, 8, dtype=x.dtype)
        for h in range(heads):
            part = slice(8 * h, 8 * h + 8)
            unit = kk[part] / kk[part].norm()
            state[h] = state[h] * d[part] - torch.outer(state[h] @ unit, unit * a[part]) + torch.outer(v[part], k[part])
            y[h] = state[h] @ r[part]
            bonus[h] = (r[part] * k[part] * own["bonus"][h]).sum() * v[part]
        centred = y - y.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 8e-5)
        normed = normed.flatten() * mixer.norm.weight + mixer.norm.bias
        out.append(mixer.o_proj.weight @ (g * (normed + bonus.flatten())))
    return torch.stack(out), torch.stack(values)


@torch.no_grad()
def test_layers_follow_the_published_equations():
    model, seen = small_model(mixers=["gla", "rwkv7", "rwkv7"], pre_norm="layernorm"), {}
    for i in (1, 2):
        model.model.layers[i].mixer.register_forward_hook(
            lambda module, args, output, i=i: seen.update({i: (args[0][0], output[0])})
        )
    model(torch.randint(0, 97, (1, 17)))
    values = None
    for i in (1, 2):
        x, y = seen[i]
        expected, values = restated(model.model.layers[i].mixer, x, values)
        assert (expected - y).abs().max() < 1e-9


def test_initial_values_are_the_published_ones():
    layers = [layer.mixer for layer in SpikeLMForCausalLM(small_config(mixers="rwkv7")).model.layers]
    first, last = layers[0], layers[2]
    assert not hasattr(first, "value") and hasattr(last, "value")
    ramp = torch.arange(32) / 32
    assert torch.allclose(first.mix_w, 1 - ramp**0.9) and torch.allclose(last.mix_k, 1 - ramp ** (0.7 / 3))
    wave = (torch.arange(32) % 8 - 3.5) / 3.5
    place = torch.arange(32) / 31
    assert torch.allclose(first.channels.decay, -5.5 + 6 * place + 2.5 * wave * wave.abs(), atol=1e-5)
    assert torch.allclose(last.channels.value, 0.73 - 0.4 * (place - 0.5), atol=1e-6)
    assert (last.norm.weight == 1.0).all() and torch.allclose(first.norm.weight, torch.tensor((1 / 3) ** 0.7))
    assert not first.o_proj.weight.any() and not first.decay[0].weight.any()


@torch.no_grad()
def test_silent_keys_are_finite_in_float16():
    model = small_model(mixers="rwkv7", dtype=torch.float32).half()
    for layer in model.model.layers:
        layer.mixer.k_proj.weight.zero_()
    assert model(torch.randint(0, 97, (2, 9))).logits.isfinite().all()


def test_checkpointing_that_would_lose_gradients_of_the_first_values_is_refused():
    """Re-entrant checkpointing runs layers without gradients first: what crosses layers would be a constant."""
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match="use_reentrant"):
        small_model(mixers="rwkv7").gradient_checkpointing_enable(reentrant)
    small_model(mixers=["rwkv7", "gla", "gla"]).gradient_checkpointing_enable(reentrant)
