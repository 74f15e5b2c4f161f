"""A spike site: its formula, thresholds, gradients, and what it does in other dtypes."""

import pytest
import torch

from small_models import SITES, small_config, small_model
from spikelm.spiking import SpikeSite


def make(width=16, **changes):
    return SpikeSite(small_config(spike_sites=SITES, **changes), 0, "qkv", width)


def test_counts_follow_the_adaptive_threshold():
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    counts, threshold = make(spike_k=3).encode(x)
    mean = x.abs().mean(-1, keepdim=True)
    assert torch.allclose(threshold, mean / 3, rtol=1e-12)
    assert torch.equal(counts, torch.round(x / (mean / 3)))


def test_dead_zone_silences_small_inputs_and_nothing_else():
    x = torch.randn(5, 16, dtype=torch.float64)
    mean = x.abs().mean(-1, keepdim=True)
    plain = make(spike_k=4).encode(x)[0]
    zoned = make(spike_k=4, spike_dead_zone=0.5).encode(x)[0]
    inside = x.abs() < 0.5 * mean
    assert inside.any() and (zoned[inside] == 0).all() and torch.equal(zoned[~inside], plain[~inside])


def test_dead_zone_per_channel():
    site = make(spike_dead_zone_per_channel=True)
    site.dead_zone[:8] = 100.0
    counts = site.encode(torch.randn(5, 16))[0]
    assert (counts[:, :8] == 0).all() and counts[:, 8:].any()


def test_stored_magnitude_replaces_the_mean_of_the_token():
    site = make(spike_threshold="calibrated", spike_magnitude=6.0, spike_k=3)
    counts, threshold = site.encode(torch.tensor([[2.0, -5.0, 0.9] + [0.0] * 13]))
    assert (threshold == 2.0).all() and counts[0, :3].tolist() == [1, -2, 0]


def test_max_count_clips():
    counts = make(spike_max_count=3).encode(100 * torch.randn(4, 16))[0]
    assert counts.abs().max() == 3


def test_binary_code_fires_on_positive_inputs_only():
    x = torch.randn(4, 16)
    counts = make(spike_code="binary").encode(x)[0]
    assert (counts >= 0).all() and (counts[x < 0] == 0).all() and counts.any()


def test_gradient_is_straight_through():
    x = torch.randn(4, 16, requires_grad=True)
    site = make(spike_dead_zone=0.5)
    weight = torch.randn(4, 16)
    (site(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_learned_threshold_gets_the_step_size_gradient():
    """d out / dV = s - x / V where nothing is clipped (LSQ), V = magnitude / k."""
    site = make(spike_threshold="learned", spike_magnitude=1.5, spike_k=2)
    x = torch.randn(4, 16)
    site(x).sum().backward()
    counts, threshold = site.encode(x)
    assert torch.allclose(site.magnitude.grad, ((counts - x / threshold).sum() / 2)[None], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_in_a_lower_dtype_fires_alike_on_the_same_activations(dtype):
    x = torch.randn(7, 16).to(dtype)
    site = make(spike_dead_zone=0.4)
    wide = site.encode(x.float())
    low = site.to(dtype).encode(x)
    assert torch.equal(wide[0], low[0]) and torch.equal(wide[1], low[1])
    assert site(x).dtype == dtype


def test_output_is_counts_times_threshold_with_and_without_gradients():
    site = make()
    x = torch.randn(5, 16)
    counts, threshold = site.encode(x)
    assert torch.equal(site(x), counts * threshold)
    assert torch.equal(site(x.requires_grad_()), counts * threshold)


def test_sites_stand_only_where_the_configuration_says():
    model = small_model(spike_sites=[["qkv"], [], ["down", "o"]])
    sites = [name for name, module in model.named_modules() if isinstance(module, SpikeSite)]
    assert sites == ["model.layers.0.mixer.qkv_site", "model.layers.2.mixer.o_site", "model.layers.2.ffn.down_site"]
