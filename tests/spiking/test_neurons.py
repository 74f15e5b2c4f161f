"""Neurons at sites against straight loops over their equations; padding, boundaries, learning."""

import pytest
import torch

from small_models import small_config, small_model
from spikelm.context import ForwardContext
from spikelm.spiking import SpikeStatistics, spike_groups
from spikelm.spiking.neurons import NEURONS, fire


def site(neuron, width=5, **changes):
    fields = {"spike_sites": ["o"], "spike_neuron": neuron, "spike_code": "binary", "neuron_threshold": 0.4}
    return NEURONS[neuron](small_config(**(fields | changes)), 0, "o", width)


def context(length=12, batch=2, mask=None, positions=None):
    positions = torch.arange(length)[None].expand(batch, -1) if positions is None else positions
    return ForwardContext.build(positions, mask, None)


def currents(length=12, width=5):
    return torch.randn(2, length, width, dtype=torch.float64)


def loop(x, decay, threshold):
    """Hard reset, euler gain: `[B, T, D]` -> spikes."""
    v, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = decay * v + (1 - decay) * x[:, t]
        s = (h >= threshold).to(x.dtype)
        v = h * (1 - s)
        out.append(s)
    return torch.stack(out, 1)


def test_lif_follows_its_equation():
    x = currents()
    assert torch.equal(site("lif")(x, context()), loop(x, 0.5, 0.4))
    assert torch.equal(site("lif", neuron_decay=0.9)(x, context()), loop(x, 0.9, 0.4))


def test_ternary_spikes_are_an_on_and_an_off_unit():
    x = currents()
    spikes = site("lif", spike_code="ternary")(x, context())
    assert torch.equal(spikes, loop(x, 0.5, 0.4) - loop(-x, 0.5, 0.4))
    assert {-1.0, 0.0, 1.0} == set(spikes.unique().tolist())


def test_plif_starts_as_lif_and_learns_decay_and_threshold():
    x, unit = currents(), site("plif")
    spikes = unit(x.requires_grad_(), context())
    assert torch.equal(spikes, loop(x, torch.sigmoid(unit.decay_logit).double(), unit.thresholds.double()).detach())
    spikes.sum().backward()
    assert unit.decay_logit.grad.all() and unit.thresholds.grad.all() and x.grad.isfinite().all()


def test_plif_thresholds_that_learning_takes_below_zero_stay_thresholds():
    x, unit = currents(), site("plif")
    with torch.no_grad():
        unit.thresholds.fill_(-0.4)
    assert torch.equal(unit(x, context()), loop(x, 0.5, 0.4))
    assert not unit(torch.zeros_like(x), context()).any()


def test_an_astrocyte_starts_silent_and_then_calms_a_busy_unit():
    x, unit = currents(200).abs(), site("astrocyte")
    assert torch.equal(unit(x, context(200)), loop(x, 0.5, 0.4))
    with torch.no_grad():
        unit.threshold_gain.fill_(1.0)
    assert unit(x, context(200))[:, 100:].mean() < 0.9 * loop(x, 0.5, 0.4)[:, 100:].mean()
    lives = torch.log(torch.tensor(0.5)) / torch.sigmoid(unit.calcium_logit).log()
    assert lives[0].item() == pytest.approx(8, rel=1e-3) and lives[-1].item() == pytest.approx(2048, rel=1e-2)


def test_a_reset_free_unit_reads_its_decay_off_the_last_tokens():
    x, unit = currents(), site("dsn", spike_code="bitwise")
    with torch.no_grad():
        unit.potential.weight.normal_()
    weight, bias = unit.potential.weight.double(), unit.potential.bias.double()
    padded = torch.cat([x.new_zeros(2, 3, 5), x], 1)
    h, expected = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        alpha = torch.sigmoid(sum(weight[i] * padded[:, t + 3 - i] for i in range(4)) + bias)
        h = alpha * h + (1 - alpha) * x[:, t]
        expected.append(h)
    potentials = unit.potential(x, context())
    assert (potentials - torch.stack(expected, 1)).abs().max() < 1e-12
    counts, threshold = unit.encode(potentials)
    assert torch.equal(unit(x, context()), counts * threshold)


@pytest.mark.parametrize("neuron", NEURONS)
def test_padding_neither_leaks_nor_fires_and_documents_start_at_rest(neuron):
    x, unit = currents(), site(neuron)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, [0, 1, 6]] = 0
    masked = unit(x, context(mask=mask))
    real = mask[0].bool()
    assert torch.equal(masked[0, real], unit(x[:1, real], context(9, 1))[0])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6])[None].expand(2, -1)
    packed = unit(x, context(positions=positions))
    assert torch.equal(packed[:, 5:], unit(x[:, 5:], context(7)))


@pytest.mark.parametrize("neuron", NEURONS)
@torch.no_grad()
def test_bfloat16_currents_fire_like_the_same_in_float32(neuron):
    x, unit = currents(60).bfloat16(), site(neuron)
    for parameter in unit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    rounded, exact = unit(x, context(60)), unit(x.float(), context(60))
    assert rounded.dtype is torch.bfloat16 and torch.equal(rounded, exact.bfloat16())


def test_temporal_gradients_can_be_cut():
    x = currents().requires_grad_()
    full = torch.autograd.grad(site("lif")(x, context())[:, -1].sum(), x)[0]
    cut = torch.autograd.grad(site("lif", neuron_temporal_grad="none")(x, context())[:, -1].sum(), x)[0]
    assert full[:, :-1].any() and not cut[:, :-1].any() and cut[:, -1].any()


def test_temporal_gradients_of_a_reset_free_unit_can_be_cut():
    """Its gradient ends at pieces of a window; its potentials stay the same to the last bit."""
    x, full = currents().requires_grad_(), site("dsn").potential
    expected = full(x, context())
    reach = torch.autograd.grad(expected[:, -1].sum(), x)[0].abs().sum((0, 2))
    assert reach.all()
    for changes, seen in (
        ({"neuron_temporal_grad": "none"}, 1),
        ({"neuron_temporal_grad": "truncated", "neuron_grad_window": 5}, 2),  # 12 tokens: pieces of 5, 5 and 2
    ):
        unit = site("dsn", **changes).potential
        potentials = unit(x, context())
        assert torch.equal(potentials, expected)
        cut = torch.autograd.grad(potentials[:, -1].sum(), x, retain_graph=True)[0].abs().sum((0, 2))
        assert not cut[:-seen].any() and torch.allclose(cut[-seen:], reach[-seen:])
        potentials.square().sum().backward()
        assert unit.bias.grad.all() and unit.weight.grad.any()


def test_embeddings_fire_by_their_sign():
    x = torch.tensor([[[-0.1, 0.0, 0.2]]], requires_grad=True)
    spikes = fire(x)
    assert spikes.tolist() == [[[0.0, 1.0, 1.0]]]
    spikes.sum().backward()
    assert torch.allclose(x.grad, 1 / (1 + (torch.pi * x) ** 2))  # atan, alpha 2


@torch.no_grad()
def test_spikes_at_block_outputs_are_counted_though_no_linear_reads_them():
    model = small_model(spike_sites=["mixer_out", "ffn_out"], spike_neuron="lif", spike_code="binary")
    assert [group.name for group in spike_groups(model)] == ["mixer_out", "ffn_out"] * 3
    seen = []
    for group in spike_groups(model):
        group.site.observers.append(lambda site, counts, *_: seen.append(counts))
    with SpikeStatistics(model) as statistics:
        model(torch.randint(0, 97, (2, 9)))
    summary = statistics.summary()
    spikes = torch.stack(seen)
    assert summary["silent_share"] == pytest.approx(1 - spikes.mean().item())
    assert summary["firing_rate"]["unary"] == pytest.approx(spikes.mean().item())
    assert summary["silent_share_reads"] == 0.0 and summary["synops_per_token"]["unary"] == 0.0
