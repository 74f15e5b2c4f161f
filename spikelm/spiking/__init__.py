"""Spike codes at work in a model: sites, statistics, execution on trains."""

from spikelm.spiking.site import SpikeGroup, SpikeSite, spike_groups
from spikelm.spiking.statistics import SpikeStatistics
from spikelm.spiking.trains import execute_trains

__all__ = ["SpikeGroup", "SpikeSite", "SpikeStatistics", "execute_trains", "spike_groups"]
