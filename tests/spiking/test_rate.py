"""The rate regulariser: its equation, its gradients, and what it takes away when a model trains on it."""

import pytest
import torch

from small_models import SITES, small_config, small_model
from spikelm.spiking import SpikeSite, SpikeStatistics, spike_groups
from spikelm.spiking.rate import RateRegulariser, soft_active


def watched(model, **fields):
    regulariser = RateRegulariser(**fields)
    regulariser.on_train_begin(None, None, None, model=model)
    return regulariser


def test_the_rate_follows_its_equation_token_by_token():
    model = small_model(spike_sites=SITES, spike_dead_zone=0.4, spike_k=3.0).train()
    seen = {}
    for group in spike_groups(model):
        group.site.register_forward_pre_hook(lambda site, args: seen.__setitem__(site, args[0].detach()))
    regulariser, counts = watched(model, weight=2.0, width=0.2), torch.rand(2, 9) < 0.5
    model(torch.randint(0, 97, (2, 9)))
    total = reads = 0.0
    for group in spike_groups(model):
        x = seen[group.site].abs()
        for b, t in counts.nonzero().tolist():
            excess = x[b, t] / x[b, t].mean() - 0.4
            total += group.fan_out * torch.sigmoid(excess / 0.2).sum().item()
        reads += group.fan_out * group.site.width
    term = regulariser.loss_terms(counts)
    assert list(term) == ["rate"] and term["rate"].item() == pytest.approx(2.0 * total / reads, rel=1e-6)
    hooks = [len(group.site._forward_pre_hooks) for group in spike_groups(model)]
    regulariser.on_train_end(None, None, None)
    assert [len(group.site._forward_pre_hooks) + 1 for group in spike_groups(model)] == hooks


@pytest.mark.parametrize("changes", [{}, {"spike_threshold": "learned"}, {"spike_code": "binary"}])
def test_gradients(changes):
    site = SpikeSite(small_config(spike_sites=SITES, spike_dead_zone=0.5, **changes), 0, "o", 6)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: soft_active(site, x, 0.3), x)
    (gradient,) = torch.autograd.grad(soft_active(site, x, 0.3).sum(), x)
    if not changes:  # larger activations alone change nothing
        assert (gradient * x).sum(-1).abs().max() < 1e-12
    if site.magnitude is not None:
        soft_active(site, x.detach(), 0.3).sum().backward()
        assert site.magnitude.grad is not None


def test_what_rounds_to_zero_is_silent_without_a_zone_too():
    site = SpikeSite(small_config(spike_sites=SITES, spike_k=2.0), 0, "o", 8)
    x = torch.randn(100, 8)
    soft = soft_active(site, x, 1e-6)
    assert torch.equal(soft.round(), (site.encode(x)[0] != 0).float())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_it_makes_sites_silent(checkpointing):
    model = small_model(torch.float32, spike_sites=SITES, spike_dead_zone=0.3).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    regulariser, ids = watched(model, weight=1.0), torch.randint(0, 97, (2, 9))
    counts, shares, terms = torch.ones(2, 9, dtype=torch.bool), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(8):
        with SpikeStatistics(model) as statistics:
            model(ids)
        shares.append(statistics.summary()["silent_share_reads"])
        terms.append(regulariser.loss_terms(counts)["rate"])
        terms[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert shares[-1] > shares[0] + 0.1 and terms[-1] < terms[0]


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = small_model(spike_sites=SITES, spike_dead_zone=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        regulariser = watched(model, weight=1.0)
        for _ in range(2):  # what a backward pass computes again must not be counted in the next term
            loss = model(torch.arange(18).view(2, 9)).logits.square().mean()
            (loss + regulariser.loss_terms(torch.ones(2, 9, dtype=torch.bool))["rate"]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*gradients))


@pytest.mark.parametrize("changes", [{}, {"spike_sites": SITES, "spike_neuron": "dsn"}, {"spike_sites": ["ffn_out"]}])
def test_models_without_a_rate(changes):
    with pytest.raises(ValueError, match="no rate to regularise"):
        watched(small_model(**changes), weight=1.0)
