"""Softmax attention: which keys a query sees, and parity with transformers."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from small_models import small_config, small_model
from spikelm.cache import CACHE_NAME
from spikelm.context import ForwardContext
from spikelm.mixers.attention import Int8Steps, SoftmaxCore, rotate


def visible_keys(length, **fields):
    """`[T, T]` bool: which keys each query's output depends on, found by changing one value at a time."""
    config = small_config(mixers="swa", attention_rope="none", num_hidden_layers=1, **fields)
    core = SoftmaxCore(config, 0, windowed=True)
    context = ForwardContext.build(torch.arange(length)[None], None, None)
    q, k, v = (torch.randn(1, length, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    before = core(q, k, v, q, context)[0]
    seen = torch.zeros(length, length, dtype=torch.bool)
    for key in range(length):
        changed = v.clone()
        changed[:, key] += 1
        seen[:, key] = (core(q, k, changed, q, context)[0] - before).abs().sum((0, 2, 3)) > 1e-12
    return seen


def expected(length, width, sinks=0):
    query, key = torch.arange(length)[:, None], torch.arange(length)
    return (key <= query) & ((key > query - width) | (key < sinks))


def test_window_holds_exactly_w_keys():
    assert torch.equal(visible_keys(12, attention_window=5), expected(12, 5))


def test_published_off_by_one_sees_one_key_more_in_a_pass():
    seen = visible_keys(12, attention_window=5, attention_window_off_by_one=True)
    assert torch.equal(seen, expected(12, 6))


def test_sinks_stay_visible():
    assert torch.equal(visible_keys(12, attention_window=4, attention_sinks=2), expected(12, 4, sinks=2))


@torch.no_grad()
def test_published_off_by_one_steps_see_w_keys():
    """Prefill sees w + 1 keys, single-token steps w, as in the release (facts of SpikingBrain, 1.2)."""
    changes = {"mixers": "swa", "num_hidden_layers": 1, "attention_window": 4}
    flagged = small_model(attention_window_off_by_one=True, **changes)
    plain = small_model(**changes)
    plain.load_state_dict(flagged.state_dict())
    wider = small_model(**(changes | {"attention_window": 5}))
    wider.load_state_dict(flagged.state_dict())
    ids = torch.randint(0, 97, (1, 11))
    assert (flagged(ids).logits - wider(ids).logits).abs().max() < 1e-12

    cache = None
    for t in range(11):
        out = flagged(ids[:, t : t + 1], cache=cache, use_cache=True)
        cache = out[CACHE_NAME]
        assert (out.logits[0, 0] - plain(ids).logits[0, t]).abs().max() < 1e-9
    chunked = flagged(ids[:, :6], use_cache=True)
    rest = flagged(ids[:, 6:], cache=chunked[CACHE_NAME])
    assert (rest.logits - wider(ids).logits[:, 6:]).abs().max() < 1e-9


def test_rotation_turns_only_the_given_width():
    x = torch.randn(1, 2, 3, 8)
    angle = torch.rand(1, 3, 4)
    turned = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[..., :4], x[..., :4])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5000.0},
        {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
@torch.no_grad()
def test_llama_with_scaled_rope_is_reproduced(rope):
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
    }
    llama = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=dict(rope))).eval()
    mine = small_model(dtype=torch.float32, num_hidden_layers=2, rope_parameters=dict(rope))
    names = {
        "self_attn": "mixer",
        "mlp": "ffn",
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    renamed = {}
    for name, tensor in llama.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    mine.load_state_dict(renamed)
    ids = torch.randint(0, 97, (2, 40))
    assert (mine(ids).logits - llama(ids).logits).abs().max() < 1e-5


W8ASPIKE = {"attention_query_spikes": True, "attention_int8_keys_values": True}


@pytest.mark.parametrize("mixers", ["attention", "swa"])
@torch.no_grad()
def test_coded_queries_and_int8_keys_values_agree_token_by_token(mixers):
    """Keys are rounded before they are kept, queries when they are made: a token's numbers depend on it alone."""
    model = small_model(mixers=mixers, **W8ASPIKE)
    ids, mask = torch.randint(0, 97, (2, 13)), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    whole = model(ids, attention_mask=mask).logits
    out = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    logits = [out.logits]
    for t in range(6, 13):
        out = model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], **{CACHE_NAME: out.past_key_values})
        logits.append(out.logits)
    assert (torch.cat(logits, 1) - whole)[mask.bool()].abs().max() < 1e-9
    plain = small_model(mixers=mixers)
    plain.load_state_dict(model.state_dict())
    assert (plain(ids, attention_mask=mask).logits - whole)[mask.bool()].abs().max() > 1e-3


def test_coded_queries_and_int8_keys_values_pass_gradients_straight_through():
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 8, dtype=torch.float64)
    (Int8Steps.apply(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    model = small_model(mixers="attention", **W8ASPIKE)
    model(torch.arange(9)[None]).logits.square().mean().backward()
    mixer = model.model.layers[0].mixer
    assert all(linear.weight.grad.abs().max() > 0 for linear in (mixer.q_proj, mixer.k_proj, mixer.v_proj))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_int8_steps(dtype):
    x = torch.randn(5, 16, dtype=dtype)
    x[2] = 0
    steps = Int8Steps.apply(x)
    assert steps.dtype is dtype and (steps[2] == 0).all()
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    error = (steps.double() - x.double()).abs()
    assert (error <= scale / 2 + x.double().abs() * torch.finfo(dtype).eps).all()
    assert error[:2].max() > scale[:2].max() / 4, "rounded at all"
