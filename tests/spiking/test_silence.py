"""The silent share counted by itself."""

import pytest
import torch

from small_models import SITES, small_model
from spikelm import SpikeStatistics, spike_groups
from spikelm.spiking.silence import counted_silence, silent_reads


def test_it_is_that_of_the_statistics_and_leaves_nothing_behind():
    model = small_model(spike_sites=SITES, spike_dead_zone=0.4)
    groups = list(spike_groups(model))
    with counted_silence(model) as counted, SpikeStatistics(model) as statistics, torch.no_grad():
        for _ in range(2):
            model(torch.randint(model.config.vocab_size, (2, 9)))
    silent, reads = silent_reads(groups, counted)
    summary = statistics.summary()
    assert 0 < silent < reads
    assert silent / reads == pytest.approx(summary["silent_share_reads"], abs=1e-12)
    for row in statistics.by_site():
        assert counted[row["path"]][0] / counted[row["path"]][1] == pytest.approx(row["silent_share"], abs=1e-12)
    assert not any(group.site.observers for group in groups)


def test_a_model_without_sites_has_none():
    model = small_model()
    with counted_silence(model) as counted, torch.no_grad():
        model(torch.randint(model.config.vocab_size, (1, 5)))
    assert silent_reads([], counted) == (0, 0)
