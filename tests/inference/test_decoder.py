"""Runs of plain layers: tier 2 and 3 against the same layers' modules, and every way out of a run."""

import copy

import pytest
import torch

from small_models import PATTERNS, SITES, small_model
from spikelm import SpikeCache, SpikeStatistics, prepare_for_inference
from spikelm.cache import CACHE_NAME
from spikelm.inference.decoder import LOOK, ROOM, LayerRun, is_plain
from spikelm.inference.linears import EventProduct
from spikelm.kernels import cpp

CLOSE = 1e-4
VARIANTS = {
    "plain": {"mixers": "attention", "tie_word_embeddings": True},
    "biases": {
        "mixers": "attention",
        "attention_bias": True,
        "attention_output_bias": True,
        "ffn_bias": True,
        "pre_norm": "rmsnorm_1p",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "between": {"mixers": ["attention", "gla", "attention"]},
}


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 12))


@pytest.fixture(params=["cpp", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpp, "library", lambda *_: None)


@torch.no_grad()
def decode(model, ids, cache=None, first=5):
    pieces = []
    if cache is None:
        out = model(ids[:, :first], use_cache=True)
        cache, pieces, ids = out[CACHE_NAME], [out.logits], ids[:, first:]
    pieces += [model(token[:, None], cache=cache).logits for token in ids.unbind(1)]
    return torch.cat(pieces, 1)


def by_modules(model):
    """The same prepared model without its runs."""
    model = copy.deepcopy(model)
    model.model.runs = list(model.model.layers)
    return model


def tokens_run(model):
    return [prepared._tokens for run in model.model.runs if isinstance(run, LayerRun)
            for prepared in run.prepared.values()]  # fmt: skip


def differ(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("events", ["always", "never"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_run_equals_its_modules_without_spikes(variant, format, events, ids, path):
    model = prepare_for_inference(small_model(torch.float32, **VARIANTS[variant]), format, events)
    for batch in (1, 2):
        assert differ(decode(model, ids[:batch]), decode(by_modules(model), ids[:batch])) < CLOSE
    assert set(tokens_run(model)) == {7}


@pytest.mark.parametrize("threshold", ["token", "calibrated"])
@pytest.mark.parametrize("code, limit", [("bitwise", None), ("binary", 2)])
def test_one_layer_with_spikes(code, limit, threshold, ids, path):
    options = {"spike_code": code, "spike_max_count": limit, "spike_threshold": threshold, "spike_dead_zone": 0.4}
    options |= {"spike_dead_zone_per_channel": threshold == "token", "spike_magnitude": 0.7}
    model = small_model(torch.float32, spike_sites=SITES, num_hidden_layers=1, **options)
    prepare_for_inference(model, "int8", "always")
    assert differ(decode(model, ids), decode(by_modules(model), ids)) < CLOSE


def test_counts_are_the_bits_of_the_site(ids):
    model = small_model(torch.float32, spike_sites=SITES, num_hidden_layers=1, spike_dead_zone=0.4)
    prepare_for_inference(model, "fp32", "always")
    decode(model, ids)
    step = next(iter(model.model.runs[0].prepared.values())).steps[0]
    counts, threshold = model.model.layers[0].mixer.o_site.encode(step.attend.heads)
    assert torch.equal(step.o.call.counts, counts) and torch.equal(step.o.call.threshold, threshold)


@pytest.mark.parametrize("name", ["swa", "gla", "gemma-like", "rwkv-ffns", "lif", "moe", "gla+attention"])
def test_what_is_not_plain(name):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=SITES, **PATTERNS[name]), "fp32", "always")
    plain = [is_plain(layer) for layer in model.model.layers]
    assert not any(plain[:2])
    assert sum(isinstance(run, LayerRun) for run in model.model.runs) == any(plain)


def test_two_texts_in_turn_and_a_look_in_between(ids):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=[]), "fp32", "always")
    expected = decode(model, ids)
    caches = [model(row[None, :5], use_cache=True)[CACHE_NAME] for row in ids]
    logits = [[], []]
    for t in range(5, 12):
        for row, cache in enumerate(caches):
            logits[row].append(model(ids[row : row + 1, t : t + 1], cache=cache).logits)
        if t == 7:
            saved = caches[0].state_dict()
            assert saved["states"]["layers.2.mixer.attention.keys"].shape[2] == 8
        if t == 9:
            caches[1] = copy.deepcopy(caches[1])
    assert differ(torch.cat([torch.cat(row, 1) for row in logits]), expected[:, 5:]) < CLOSE
    # The saved states have not been written over: the text goes on from them once more.
    cache = SpikeCache(model.config)
    cache.load_state_dict(saved)
    assert differ(decode(model, ids[:1, 8:], cache), expected[:1, 8:]) < CLOSE


def test_beams_are_reordered():
    model = prepare_for_inference(small_model(torch.float32, spike_sites=[]), "fp32", "always")
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(2, 97, (2, 6))
    assert torch.equal(model.generate(ids, **options), by_modules(model).generate(ids, **options))
    assert tokens_run(model)


def test_a_text_outgrows_its_room():
    model = prepare_for_inference(small_model(torch.float32, spike_sites=[], num_hidden_layers=1), "fp32", "always")
    ids = torch.randint(2, 97, (1, ROOM + 40))
    assert differ(decode(model, ids), model(ids).logits) < CLOSE


def test_padding_observers_and_hooks_leave_the_run(ids):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=SITES), "fp32", "always")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    with SpikeStatistics(model) as statistics:
        model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert statistics.by_site()[0]["tokens"] == 14
    assert len(model(ids[:1, :1], output_hidden_states=True).hidden_states) == 4
    assert tokens_run(model) == []


def test_tensors_that_move_are_found_again(ids):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=[]), "fp32", "always")
    expected = decode(model, ids)
    model.double()
    model.float()
    assert differ(decode(model, ids), expected) < CLOSE


def test_auto_follows_the_share_of_active_inputs(ids, monkeypatch):
    model = small_model(torch.float32, spike_sites=SITES, spike_dead_zone=0.5)
    monkeypatch.setattr("spikelm.inference.prepare.most_active", lambda shapes: dict.fromkeys(
        (f"{i}x{o}x{b}" for i, o in shapes for b in (1, 2, 4, 8)), 0.5))  # fmt: skip
    prepare_for_inference(model, "fp32", "auto")
    decode(model, torch.randint(2, 97, (1, LOOK + 10)))
    steps = next(iter(model.model.runs[0].prepared.values())).steps
    for switch in (s for step in steps for s in step.switches):
        assert set(switch.calls) == {False, True} and switch.call in switch.calls.values()
    active = steps[0].qkv.call.counts.count_nonzero().item()
    steps[0].qkv.most_active = active - 1
    steps[0].qkv.look()
    assert steps[0].qkv.call.dense
    steps[0].qkv.most_active = steps[0].qkv.call.weights.inputs
    assert steps[0].qkv.look() and not steps[0].qkv.call.dense
    product = next(m for m in model.modules() if isinstance(m, EventProduct))
    x = torch.zeros(1, 32)
    x[0, :16] = 1.0
    assert not product._reads_all(x, 1)
    x[0, 16] = 1.0
    assert product._reads_all(x, 1)
