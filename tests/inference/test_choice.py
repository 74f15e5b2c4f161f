"""The table behind events="auto": break-even shares from times that a made-up clock dictates, measured once."""

import json

import pytest
import torch

from small_models import SITES, small_model
from spikelm import prepare_for_inference
from spikelm.inference import choice
from spikelm.inference.linears import EventProduct
from spikelm.kernels.weight_rows import pack_rows


class Machine:
    """A clock, and products that take as long as it is told: a second when dense, else `slope` times the share."""

    def __init__(self, slope):
        self.slope, self.now, self.calls = slope, 0.0, 0

    def clock(self):
        return self.now

    def product(self, x, rows, threshold=None, dense=False):
        self.calls += 1
        assert (threshold is None) == (rows.scales is None)
        self.now += 1.0 if dense else self.slope * (x != 0).any(0).float().mean().item()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path))
    return tmp_path


def measure(monkeypatch, slope, format="int8"):
    machine = Machine(slope)
    monkeypatch.setattr(choice, "event_linear", machine.product)
    rows = pack_rows(torch.randn(24, 100), format)
    return choice.most_active({(100, 24): rows}, clock=machine.clock), machine


@pytest.mark.parametrize("slope, expected", [(2.0, 0.5), (1.25, 0.8), (0.5, 1.0), (20.0, 0.0)])
def test_the_share_at_which_both_cost_the_same(slope, expected, monkeypatch):
    known, _ = measure(monkeypatch, slope)
    assert set(known) == {f"100x24x{batch}" for batch in choice.BATCHES}
    assert all(value == pytest.approx(expected, abs=1e-6) for value in known.values())


def test_measured_once_for_a_machine_and_format(monkeypatch, own_cache):
    first, machine = measure(monkeypatch, 2.0)
    assert machine.calls == len(choice.BATCHES) * (1 + len(choice.SHARES)) * (1 + choice.REPEATS)
    again, machine = measure(monkeypatch, 20.0)
    assert again == first and machine.calls == 0
    _, machine = measure(monkeypatch, 2.0, format="fp32")
    assert machine.calls > 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    _, machine = measure(monkeypatch, 2.0)
    assert machine.calls > 0
    assert len(list(own_cache.glob("events-*.json"))) == 3


def test_a_damaged_table_is_measured_anew(monkeypatch, own_cache):
    measure(monkeypatch, 2.0)
    (path,) = own_cache.glob("events-*.json")
    for damaged in ("{", json.dumps({"machine": "another", "most_active": {}}), "[]"):
        path.write_text(damaged)
        known, machine = measure(monkeypatch, 2.0)
        assert machine.calls > 0 and known


def test_sizes_in_between_take_the_next_larger():
    table = {f"8x8x{batch}": 1.0 / batch for batch in choice.BATCHES}
    assert choice.limits(table, 8, 8) == {1: 1.0, 2: 0.5, 3: 0.25, 4: 0.25, 5: 0.125, 6: 0.125, 7: 0.125, 8: 0.125}


def test_products_of_a_model_know_their_limits(monkeypatch):
    machine = Machine(2.0)
    monkeypatch.setattr(choice, "event_linear", machine.product)
    monkeypatch.setattr(choice.time, "perf_counter", machine.clock)
    monkeypatch.setattr(choice.most_active, "__defaults__", (machine.clock,))
    model = prepare_for_inference(small_model(torch.float32, spike_sites=SITES), "int8", "auto")
    for product in (m for m in model.modules() if isinstance(m, EventProduct)):
        assert product.most_active == pytest.approx(dict.fromkeys(range(1, 9), 0.5), abs=0.05)
