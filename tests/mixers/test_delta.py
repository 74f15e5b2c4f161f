"""Gated DeltaNet on heads against a straight re-statement of its equations."""

import torch
import torch.nn.functional as F

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME


def published_layer(mixer, x):
    """x `[T, hidden]` -> `[T, hidden]`: one state for each query head, keys and values repeated, one loop."""
    heads, shared, width, length = 4, 2, 8, x.shape[0]
    core = mixer.delta
    q = F.silu(x @ mixer.q_proj.weight.T).view(length, heads, width)
    k = F.silu(x @ mixer.k_proj.weight.T).view(length, shared, width)
    v = F.silu(x @ mixer.v_proj.weight.T).view(length, shared, width)
    q, k = (t / (t.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    rates = core.rates
    steps = F.softplus(x @ core.a_proj.weight.T + rates.dt_bias.double())
    decay = torch.exp(-torch.exp(rates.A_log.double()) * steps)
    beta = torch.sigmoid(x @ core.b_proj.weight.T)
    out = torch.zeros(length, heads, width, dtype=x.dtype)
    for h in range(heads):
        g = h // (heads // shared)
        state = torch.zeros(width, width, dtype=x.dtype)
        for t in range(length):
            key = k[t, g]
            erase = torch.eye(width, dtype=x.dtype) - beta[t, g] * torch.outer(key, key)
            state = decay[t, g] * erase @ state + beta[t, g] * torch.outer(key, v[t, g])
            out[t, h] = q[t, h] @ state / width**0.5
    normed = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * core.norm.weight
    return normed.flatten(1) @ mixer.o_proj.weight.T


@torch.no_grad()
def test_layer_follows_the_published_equations():
    model, seen = small_model(mixers="delta"), {}
    mixer = model.model.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    model(torch.randint(0, 97, (1, 37)))
    assert (published_layer(mixer, seen["x"][0]) - seen["y"][0]).abs().max() < 1e-9


def test_decays_start_as_published():
    core = (
        SpikeLMForCausalLM(
            small_config(mixers="delta", hidden_size=512, num_attention_heads=256, num_key_value_heads=256)
        )
        .model.layers[0]
        .mixer.delta
    )
    rate, step = core.rates.A_log.exp(), F.softplus(core.rates.dt_bias)
    assert 1 <= rate.min() < 2 and 15 < rate.max() <= 16
    assert step.min() >= 0.00099 and step.max() <= 0.1 * 1.0001
    assert step.median() < 0.02, "log-uniform: half of them below the geometric mean"
    assert torch.allclose(core.rates(torch.zeros(1, 1, 256))[0, 0], -rate * step)


@torch.no_grad()
def test_rates_stay_float32_in_a_bfloat16_model(tmp_path):
    model = small_model(dtype=torch.float32, mixers="delta")
    core = model.model.layers[0].mixer.delta
    rates = {name: t.clone() for name, t in core.rates.state_dict().items()}
    model.save_pretrained(tmp_path)
    for narrow in (
        model.to(torch.bfloat16),
        SpikeLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        core = narrow.model.layers[0].mixer.delta
        assert all(torch.equal(t, rates[name]) for name, t in core.rates.state_dict().items())
        assert core.a_proj.weight.dtype == torch.bfloat16


def test_state_is_kept_once_per_key_value_head():
    model = small_model(dtype=torch.bfloat16, mixers="delta")
    core, cache = model.model.layers[0].mixer.delta, None
    for length in (5, 1):
        with torch.no_grad():
            cache = model(torch.randint(0, 97, (3, length)), cache=cache, use_cache=True)[CACHE_NAME]
        state = cache.layers[0].states["mixer.delta.recurrent"]
        assert state.shape == (3, *core.state_specs()["recurrent"].shape) == (3, 2, 8, 8)
        assert state.dtype == torch.float32
        assert state.untyped_storage().nbytes() == state.nbytes
    assert core.state_macs == (3 * 2 + 4) * 8 * 8


def test_gates_read_what_the_qkv_site_codes():
    mixer = small_model(mixers="delta").model.layers[0].mixer
    readers = ("q_proj", "k_proj", "v_proj", "delta.a_proj", "delta.b_proj")
    assert mixer.site_readers["qkv_site"] == readers


@torch.no_grad()
def test_silent_input_writes_nothing():
    """Where no spike arrives, keys and values are zero, without a division by their length."""
    model = small_model(mixers="delta", pre_norm="identity", embedding_scale=0.0, num_hidden_layers=1)
    cache = model(torch.randint(0, 97, (1, 6)), use_cache=True)[CACHE_NAME]
    assert not cache.layers[0].states["mixer.delta.recurrent"].any()
