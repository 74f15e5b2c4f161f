"""The spike fields of a report, against computations of a few lines."""

import pytest
import torch

from spikelm.cache import CACHE_NAME
from spikelm.eval.data import tokenize
from spikelm.eval.fidelity import run_counted
from spikelm.spiking import SpikeStatistics


@torch.no_grad()
def read_by_linears(model, ids, **inputs):
    """Linear name -> the values that it reads."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]})))
    model(ids, **inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_silent_shares_and_synops_by_hand(make_pair, tokenizer, prose):
    model, _ = make_pair(num_hidden_layers=2)
    window = tokenize(prose, tokenizer, 40, 40).windows[0]
    _, spikes, _ = run_counted(model, window)

    silent = inputs = silent_reads = reads = head = 0
    unary = bitwise = 0.0
    linears = dict(model.named_modules())
    for name, x in read_by_linears(model, window[None]).items():
        if name == "lm_head":
            head = linears[name].weight.numel()
            continue
        outputs = linears[name].out_features
        silent_reads += int((x == 0).sum()) * outputs
        reads += x.numel() * outputs
        if not name.endswith(("k_proj", "v_proj", "up_proj")):  # these read the same inputs as q_proj and gate_proj
            silent += int((x == 0).sum())
            inputs += x.numel()
    assert spikes["silent_share"] == pytest.approx(silent / inputs, rel=1e-12)
    assert spikes["silent_share_reads"] == pytest.approx(silent_reads / reads, rel=1e-12)
    all_reads = reads + 40 * head
    assert spikes["silent_share_reads_all_weights"] == pytest.approx(silent_reads / all_reads, rel=1e-12)

    with SpikeStatistics(model) as statistics:
        codes = []
        for group in statistics.groups:
            group.site.observers.append(lambda site, s, v, context, f=group.fan_out: codes.append((s, f)))
        with torch.no_grad():
            model(window[None])
    for counts, fan_out in codes:
        for value in counts.abs().flatten().int().tolist():
            unary += value * fan_out
            bitwise += bin(value).count("1") * fan_out
    assert spikes["synops_per_token"]["unary"] == pytest.approx(unary / 40, rel=1e-12)
    assert spikes["synops_per_token"]["bitwise"] == pytest.approx(bitwise / 40, rel=1e-12)


def test_slot_sparsity_and_clipped_share_by_hand(make_pair, tokenizer, prose):
    model, _ = make_pair(num_hidden_layers=1, spike_k=6.0)
    window = tokenize(prose, tokenizer, 30, 30).windows[0]
    counts = []
    with SpikeStatistics(model) as statistics, torch.no_grad():
        for group in statistics.groups:
            group.site.observers.append(lambda site, s, v, context: counts.extend(s.abs().flatten().int().tolist()))
        model(window[None])
    spikes = statistics.summary()
    for slots in (3, 4):
        ones = sum(bin(min(c, 2**slots - 1)).count("1") for c in counts)
        assert spikes["spike_slot_sparsity"][str(slots)] == pytest.approx(1 - ones / (slots * len(counts)), rel=1e-12)
        assert spikes["clipped_share"][str(slots)] == pytest.approx(
            sum(c >= 2**slots for c in counts) / len(counts), rel=1e-12
        )
    assert spikes["max_count"] == max(counts) > 15
    assert spikes["firing_rate"]["unary"] == pytest.approx(sum(counts) / len(counts), rel=1e-12)


def test_padding_does_not_change_a_statistic(make_pair):
    model, _ = make_pair()
    ids = torch.randint(97, (2, 20))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with SpikeStatistics(model) as padded, torch.no_grad():
        model(ids, attention_mask=mask)
    with SpikeStatistics(model) as plain, torch.no_grad():
        model(ids[:1, 7:])
        model(ids[1:])
    one, other = padded.summary(), plain.summary()
    assert one.pop("tokens") == other.pop("tokens") == 33
    assert one.pop("dense_macs_per_token") == pytest.approx(other.pop("dense_macs_per_token"))
    for key, value in one.items():
        assert value == pytest.approx(other[key], rel=1e-9), key


def test_a_window_counts_only_the_keys_that_it_sees(make_pair):
    model, _ = make_pair(mixers="swa", attention_window=4)
    ids = torch.randint(97, (1, 12))
    with SpikeStatistics(model) as whole, torch.no_grad():
        model(ids)
    with SpikeStatistics(model) as steps, torch.no_grad():
        cache = None
        for token in ids[0]:
            cache = model(token.view(1, 1), cache=cache, use_cache=True)[CACHE_NAME]
    seen = sum(min(t + 1, 4) for t in range(12)) / 12
    expected = 3 * 2 * seen * 4 * 8  # layers, scores and values, keys, heads, channels
    for statistics in (whole, steps):
        assert statistics.summary()["dense_macs_per_token"]["attention"] == pytest.approx(expected)
