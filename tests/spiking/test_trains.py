"""Running on trains: what the linears see, and errors. Equality with counts is in test_equality.py."""

import pytest
import torch

from small_models import SITES, small_model
from spikelm.spiking import execute_trains, spike_groups


@torch.no_grad()
def test_linears_read_nothing_but_spikes(monkeypatch):
    import spikelm.spiking.trains as module

    model = small_model(spike_sites=SITES)
    fed = []

    class Recording:
        @staticmethod
        def linear(x, weight):
            fed.append(x)
            return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(module, "F", Recording)
    with execute_trains(model, "bitwise"):
        model(torch.randint(0, 97, (1, 7)))
    readers = sum(len(group.readers) for group in spike_groups(model))
    assert len(fed) >= readers
    assert {value for x in fed for value in x.unique().tolist()} <= {-1.0, 0.0, 1.0}


@torch.no_grad()
def test_a_count_that_does_not_fit_is_an_error_and_the_model_is_restored():
    model = small_model(spike_sites=SITES)
    ids = torch.randint(0, 97, (1, 7))
    before = model(ids).logits
    with pytest.raises(ValueError, match="slots"), execute_trains(model, "bitwise", slots=1):
        model(ids)
    assert torch.equal(model(ids).logits, before)
    assert all(not group.site.observers for group in spike_groups(model))


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="no spike sites"), execute_trains(small_model()):
        pass
