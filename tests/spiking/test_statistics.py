"""Every statistic recomputed by hand from the counts of a run."""

import pytest
import torch

from small_models import SITES, leaves, small_model
from spikelm.cache import CACHE_NAME
from spikelm.spiking import SpikeStatistics, spike_groups


def recorded(model, run):
    """path -> counts `[tokens, width]` of everything that passed a site during `run`, padding excluded."""
    seen = {}
    groups = list(spike_groups(model))

    def observe(site, counts, threshold, context):
        rows = counts[context.valid] if context.valid is not None else counts.flatten(0, 1)
        path = next(g.path for g in groups if g.site is site)
        seen.setdefault(path, []).append(rows)

    for group in groups:
        group.site.observers.append(observe)
    with SpikeStatistics(model) as statistics:
        run()
    for group in groups:
        group.site.observers.remove(observe)
    return {path: torch.cat(rows) for path, rows in seen.items()}, statistics


def popcount(n):
    return bin(int(n)).count("1")


@pytest.fixture
def model():
    return small_model(mixers=["gla", "swa", "attention"], spike_sites=[SITES, ["qkv", "down"], SITES], spike_k=2.0)


@pytest.fixture
def padded():
    ids = torch.randint(2, 97, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_summary_equals_a_hand_count(model, padded):
    counts, statistics = recorded(model, lambda: model(**padded))
    summary = statistics.summary()
    groups = {group.path: group for group in spike_groups(model)}
    tokens = int(padded["attention_mask"].sum())
    inputs = sum(c.numel() for c in counts.values())
    reads = sum(c.shape[1] * groups[p].fan_out for p, c in counts.items())

    assert summary["tokens"] == tokens == 18
    silent = sum((c == 0).sum().item() for c in counts.values())
    assert summary["silent_share"] == pytest.approx(silent / inputs)
    silent_reads = sum((c == 0).sum().item() * groups[p].fan_out for p, c in counts.items()) / tokens
    assert summary["silent_share_reads"] == pytest.approx(silent_reads / reads)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert summary["silent_share_reads_all_weights"] == pytest.approx(silent_reads / weights)

    bits = {p: sum(popcount(n) for n in c.abs().flatten().tolist()) for p, c in counts.items()}
    assert summary["firing_rate"]["unary"] == pytest.approx(sum(c.abs().sum().item() for c in counts.values()) / inputs)
    assert summary["firing_rate"]["bitwise"] == pytest.approx(sum(bits.values()) / inputs)
    synops = sum(c.abs().sum().item() * groups[p].fan_out for p, c in counts.items()) / tokens
    assert summary["synops_per_token"]["unary"] == pytest.approx(synops)
    synops = sum(b * groups[p].fan_out for p, b in bits.items()) / tokens
    assert summary["synops_per_token"]["bitwise"] == pytest.approx(synops)
    assert summary["max_count"] == max(c.abs().max().item() for c in counts.values())
    for slots in (3, 4):
        largest = 2**slots - 1
        ones = sum(popcount(min(n, largest)) for c in counts.values() for n in c.abs().flatten().tolist())
        assert summary["spike_slot_sparsity"][str(slots)] == pytest.approx(1 - ones / (slots * inputs))
        clipped = sum((c.abs() > largest).sum().item() for c in counts.values())
        assert summary["clipped_share"][str(slots)] == pytest.approx(clipped / inputs)


@torch.no_grad()
def test_padding_is_not_counted(model, padded):
    _, batch = recorded(model, lambda: model(**padded))
    with SpikeStatistics(model) as single:
        model(padded["input_ids"][:1, 4:])
        model(padded["input_ids"][1:])
    assert leaves(batch.summary()) == pytest.approx(leaves(single.summary()))


@torch.no_grad()
def test_generation_is_counted_token_by_token(model, padded):
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with SpikeStatistics(model) as cached:
        sequences = model.generate(**padded, **options)
    assert cached.summary()["tokens"] == 18 + 2 * 4  # the last new token is never read
    mask = torch.cat([padded["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    with SpikeStatistics(model) as whole:
        model(sequences[:, :-1], attention_mask=mask)
    assert leaves(cached.summary()) == pytest.approx(leaves(whole.summary()))


@torch.no_grad()
def test_dense_work_that_remains(model):
    with SpikeStatistics(model) as statistics:
        model(torch.randint(0, 97, (1, 6)))
    dense = statistics.summary()["dense_macs_per_token"]
    assert dense["head"] == 32 * 97
    # Layer 1 codes neither its o nor its gate_up inputs; the gate's second factor is float-fed.
    assert dense["float_fed_linears"] == 32 * 32 + 2 * 32 * 48 + 16 * 16
    window = sum(min(t + 1, 4) for t in range(6))
    full = sum(t + 1 for t in range(6))
    assert dense["attention"] == pytest.approx(2 * 4 * 8 * (window + full) / 6)
    assert dense["linear_attention"] == (2 * 2 + 4) * 8 * 8


@pytest.mark.parametrize("changes", [{}, {"attention_window_off_by_one": True}, {"attention_sinks": 2}])
@torch.no_grad()
def test_pairs_are_those_that_attention_weighs(changes):
    """Padding, two documents in a row, windows: every weight above zero is a pair of query and key."""
    model = small_model(mixers=["swa", "attention", "swa"], spike_sites=["o"], **changes)
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 6:9] = 0
    positions = torch.cat([torch.arange(11), torch.arange(4)]).expand(2, -1)
    with SpikeStatistics(model) as statistics:
        inputs = {"input_ids": torch.randint(0, 97, (2, 15)), "attention_mask": mask, "position_ids": positions}
        weights = model(**inputs, output_attentions=True).attentions
    pairs = sum(((w > 0).any(1) & mask.bool()[:, :, None]).sum().item() for w in weights)
    macs = statistics.summary()["dense_macs_per_token"]["attention"]
    assert macs * mask.sum().item() == pytest.approx(2 * 4 * 8 * pairs)


@torch.no_grad()
def test_windowed_linear_attention_counts_its_window_and_its_sums():
    model = small_model(mixers="window_linear", spike_sites=["o"])
    ids = torch.randint(0, 97, (1, 9))
    with SpikeStatistics(model) as whole:
        model(ids)
    with SpikeStatistics(model) as stepwise:
        cache = model(ids[:, :1], use_cache=True)[CACHE_NAME]
        for t in range(1, 9):
            model(ids[:, t : t + 1], cache=cache)
    dense = whole.summary()["dense_macs_per_token"]
    assert dense["attention"] == pytest.approx(3 * 2 * 4 * 8 * sum(min(t + 1, 4) for t in range(9)) / 9)
    assert dense["linear_attention"] == 3 * (4 + 2) * (8 * 4 + 8 * 8 + 8)
    assert stepwise.summary()["dense_macs_per_token"] == pytest.approx(dense)


def test_nothing_stays_behind(model):
    with SpikeStatistics(model) as statistics:
        pass
    assert all(not group.site.observers for group in spike_groups(model))
    with pytest.raises(ValueError, match="No token passed"):
        statistics.summary()


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="no spike sites"):
        SpikeStatistics(small_model())
