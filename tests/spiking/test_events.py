"""Graded events and their gradient."""

import torch

from spikelm.spiking.events import Events


def test_events_are_states_above_their_threshold():
    events = Events(3, 0.5)
    state = torch.tensor([[[0.4, 0.5, 2.0], [-3.0, 0.6, 0.0]]])
    assert torch.equal(events(state), torch.tensor([[[0.0, 0.5, 2.0], [0.0, 0.6, 0.0]]]))


def test_the_gradient_is_that_of_the_event_and_a_triangle():
    events = Events(4, 0.5)
    state = torch.tensor([[[0.3, 0.7, 2.0, -3.0]]], dtype=torch.float64, requires_grad=True)
    events(state).sum().backward()
    triangle = (1 - (state - 0.5).abs()).clamp_min(0)
    assert torch.allclose(state.grad, (state > 0.5) + state * triangle)
    assert torch.allclose(events.thresholds.grad.double(), -(state * triangle)[0, 0])
