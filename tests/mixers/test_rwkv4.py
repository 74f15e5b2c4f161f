"""RWKV-4's mixer against a straight re-statement, and its published initial values."""

import math

import torch

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM


@torch.no_grad()
def test_layer_follows_the_published_equations():
    model, seen = small_model(mixers="rwkv4"), {}
    mixer = model.model.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], y=output[0]))
    model(torch.randint(0, 97, (1, 19)))
    x, w, bonus = seen["x"], -mixer.time.decay.double().exp(), mixer.time.first.double()
    keys, values = [], []
    for t in range(19):
        before = x[t - 1] if t else torch.zeros_like(x[0])

        def project(linear, mix, t=t, before=before):
            return linear.weight @ (mix * x[t] + (1 - mix) * before)

        keys.append(project(mixer.k_proj, mixer.mix_key))
        values.append(project(mixer.v_proj, mixer.mix_value))
        weights = [torch.exp((t - 1 - i) * w + keys[i]) for i in range(t)] + [torch.exp(bonus + keys[t])]
        average = sum(p * v for p, v in zip(weights, values)) / sum(weights)
        gate = torch.sigmoid(project(mixer.r_proj, mixer.mix_receptance))
        assert (mixer.o_proj.weight @ (gate * average) - seen["y"][t]).abs().max() < 1e-9


def test_initial_values_are_the_published_ones():
    layers = [layer.mixer for layer in SpikeLMForCausalLM(small_config(mixers="rwkv4")).model.layers]
    place = torch.arange(32) / 31
    for i, mixer in enumerate(layers):
        assert torch.allclose(mixer.time.decay, -5 + 8 * place ** (0.7 + 1.3 * i / 2), atol=1e-5)
        ramp = (torch.arange(32) / 32) ** (1 - i / 3)
        assert torch.allclose(mixer.mix_key, ramp) and torch.allclose(mixer.mix_value, ramp + 0.3 * i / 2)
        assert torch.allclose(mixer.mix_receptance, ramp**0.5)
        assert not any(linear.weight.any() for linear in (mixer.k_proj, mixer.r_proj, mixer.o_proj))
        assert torch.allclose(mixer.v_proj.weight @ mixer.v_proj.weight.T, torch.eye(32), atol=1e-5)
    bonus = layers[0].time.first - math.log(0.3)
    assert torch.allclose(bonus[:6], torch.tensor([0.0, 0.5, -0.5, 0.0, 0.5, -0.5]), atol=1e-6)
    longest = math.log(0.5) / -math.exp(layers[0].time.decay[0].item())
    assert 102 < longest < 104


def test_decays_stay_float32_in_a_bfloat16_model():
    mixer = small_model(mixers="rwkv4", dtype=torch.bfloat16).model.layers[0].mixer
    assert mixer.time.decay.dtype == torch.float32 and mixer.k_proj.weight.dtype == torch.bfloat16
