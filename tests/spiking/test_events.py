"""Graded events and their gradient."""

import pytest
import torch

from small_models import small_model
from spikelm.spiking import SpikeStatistics, execute_trains, spike_groups
from spikelm.spiking.events import Events


def test_events_are_states_above_their_threshold():
    events = Events(0, 3, 0.5)
    state = torch.tensor([[[0.4, 0.5, 2.0], [-3.0, 0.6, 0.0]]])
    assert torch.equal(events(state), torch.tensor([[[0.0, 0.5, 2.0], [0.0, 0.6, 0.0]]]))


def test_the_gradient_is_that_of_the_event_and_a_triangle():
    events = Events(0, 4, 0.5)
    state = torch.tensor([[[0.3, 0.7, 2.0, -3.0]]], dtype=torch.float64, requires_grad=True)
    events(state).sum().backward()
    triangle = (1 - (state - 0.5).abs()).clamp_min(0)
    assert torch.allclose(state.grad, (state > 0.5) + state * triangle)
    assert torch.allclose(events.thresholds.grad.double(), -(state * triangle)[0, 0])


@torch.no_grad()
def test_events_are_counted_with_what_reads_them():
    model = small_model(mixers="mingru", ffns="none", event_threshold=0.1)
    assert [(group.name, list(group.readers), group.fan_out) for group in spike_groups(model)] == [
        ("events", ["o_proj"], 32)
    ] * 3
    zeros = []
    for layer in model.model.layers:
        layer.mixer.o_site.register_forward_hook(lambda module, args, output: zeros.append(output == 0))
    with SpikeStatistics(model) as statistics:
        model(torch.randint(0, 97, (2, 9)))
    silent = torch.stack(zeros).double().mean().item()
    summary = statistics.summary()
    assert summary["silent_share"] == pytest.approx(silent) and summary["silent_share_reads"] == pytest.approx(silent)
    assert summary["synops_per_token"]["unary"] == pytest.approx((1 - silent) * 3 * 32 * 32)
    with pytest.raises(ValueError, match="no trains"), execute_trains(model):
        pass
