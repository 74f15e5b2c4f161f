"""The gated linear layer against a straight re-statement of SpikingBrain-7B's equations (facts, section 1.2)."""

import pytest
import torch
import torch.nn.functional as F

from small_models import small_config, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME
from spikelm.mixers.gla import GatedLinearCore


def published_layer(mixer, x):
    """x `[T, hidden]` -> `[T, hidden]`: relu maps, rank-16 gate / 16, no rotation, per-head norm, one loop."""
    heads, shared, width = 4, 2, 8
    core = mixer.gla
    q = F.relu(x @ mixer.q_proj.weight.T).view(-1, heads, width)
    k = F.relu(x @ mixer.k_proj.weight.T).view(-1, shared, width)
    v = (x @ mixer.v_proj.weight.T).view(-1, shared, width)
    logits = x @ core.gate[0].weight.T @ core.gate[1].weight.T + core.gate[1].bias
    decay = torch.exp(F.logsigmoid(logits) / 16).view(-1, shared, width)
    out = []
    state = torch.zeros(heads, width, width, dtype=x.dtype)
    for t in range(x.shape[0]):
        for h in range(heads):
            g = h // (heads // shared)
            state[h] = decay[t, g][:, None] * state[h] + torch.outer(k[t, g], v[t, g])
        o = torch.stack([(q[t, h] * width**-0.5) @ state[h] for h in range(heads)])
        normed = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6) * core.norm.weight
        out.append(normed.flatten() @ mixer.o_proj.weight.T)
    return torch.stack(out)


@torch.no_grad()
def test_layer_follows_the_published_equations():
    model = small_model(mixers="gla")
    inputs = {}
    mixer = model.model.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: inputs.update(x=args[0], y=output))
    model(torch.randint(0, 97, (1, 37)))
    assert (inputs["y"][0] - published_layer(mixer, inputs["x"][0])).abs().max() < 1e-9


def test_gate_starts_with_the_published_half_life():
    gate = SpikeLMForCausalLM(small_config(mixers="gla")).model.layers[0].mixer.gla.gate
    with torch.no_grad():
        decay = torch.exp(F.logsigmoid(gate(torch.zeros(1, 32))) / 16)
    assert decay.mean().item() == pytest.approx(0.957603, abs=1e-6)
    bounds = [2**-2.5 * (6 / (sum(part.weight.shape))) ** 0.5 for part in gate]
    for part, bound in zip(gate, bounds):
        assert 0.95 * bound < part.weight.abs().max() <= bound
    assert gate[1].bias.abs().max() == 0


def test_gate_bias_sets_how_long_a_new_layer_remembers():
    gate = SpikeLMForCausalLM(small_config(mixers="gla", gla_gate_bias=[0.0, 3.0, 5.0])).model.layers[2].mixer.gla.gate
    assert (gate[1].bias == 5.0).all()


@pytest.mark.parametrize("feature_map", ["relu", "sigmoid", "softplus"])
def test_feature_maps(feature_map):
    model = small_model(mixers="gla", gla_feature_map=feature_map)
    core = model.model.layers[0].mixer.gla
    expected = {"relu": F.relu, "sigmoid": torch.sigmoid, "softplus": F.softplus}[feature_map]
    x = torch.randn(5)
    assert torch.equal(core.feature_map(x), expected(x))


def test_tied_gate_is_one_minus_the_key():
    core = GatedLinearCore(small_config(mixers="gla", gla_gate="tied", gla_feature_map="sigmoid"), 0)
    keys = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    assert torch.allclose(core._log_decay(keys, keys).exp(), 1 - torch.sigmoid(keys))
    assert not hasattr(core, "gate")


def test_state_is_kept_once_per_key_value_head():
    model = small_model(dtype=torch.bfloat16, mixers="gla")
    cache = model(torch.randint(0, 97, (3, 5)), use_cache=True)[CACHE_NAME]
    state = cache.layers[0].states["mixer.gla.recurrent"]
    spec = model.model.layers[0].mixer.gla.state_specs()["recurrent"]
    assert state.shape == (3, *spec.shape) == (3, 2, 8, 8)
    assert state.dtype == spec.dtype == torch.float32


def test_dense_gate_is_the_low_rank_one_multiplied_out():
    low, dense = small_model(mixers="gla"), small_model(mixers="gla", gla_gate="dense")
    tensors = low.state_dict()
    for i in range(3):
        gate = f"model.layers.{i}.mixer.gla.gate"
        first, second = tensors.pop(f"{gate}.0.weight"), tensors.pop(f"{gate}.1.weight")
        tensors |= {f"{gate}.weight": second @ first, f"{gate}.bias": tensors.pop(f"{gate}.1.bias")}
    dense.load_state_dict(tensors)
    ids = torch.randint(0, 97, (2, 15))
    assert (dense(ids).logits - low(ids).logits).abs().max() < 1e-9


@pytest.mark.parametrize("gate, readers", [("low_rank", "gla.gate.0"), ("dense", "gla.gate"), ("tied", None)])
def test_gate_reads_what_the_qkv_site_codes(gate, readers):
    maps = {"gla_feature_map": "sigmoid"} if gate == "tied" else {}
    mixer = small_model(mixers="gla", gla_gate=gate, **maps).model.layers[0].mixer
    assert mixer.site_readers["qkv_site"] == ("q_proj", "k_proj", "v_proj") + ((readers,) if readers else ())


def test_dense_gate_starts_at_its_bias():
    model = SpikeLMForCausalLM(small_config(mixers="gla", gla_gate="dense", gla_gate_bias=2.0))
    assert torch.equal(model.model.layers[1].mixer.gla.gate.bias, torch.full((16,), 2.0))
