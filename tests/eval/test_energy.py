"""The estimate of energy, by hand and against what is published; constants of a user's own."""

import json
import re

import pytest
import torch
import yaml
from tqdm import tqdm

from report_keys import documented_keys, written_keys
from small_models import small_model
from spikelm.eval import energy, spike_detail
from spikelm.eval.energy_model import ACCOUNTINGS, COLUMNS, CONSTANTS, Network, Shared, Site, network_of, read_constants
from spikelm.eval.parts import Subject


def estimated(model, tokenizer, prose, constants=None):
    subject = Subject(model, None, tokenizer, [prose], prose)
    spikes = spike_detail.measure(subject, spike_detail.Settings(40, 20), tqdm(disable=True), {})
    return energy.measure(subject, energy.Settings(constants), tqdm(disable=True), {"spikes": spikes}), spikes


def test_the_documented_keys_are_the_written_keys(make_pair, tokenizer, prose):
    result, _ = estimated(make_pair(num_hidden_layers=1)[0], tokenizer, prose)
    written = written_keys(json.loads(json.dumps(result)), "energy")
    assert written == documented_keys("energy")


def test_what_the_paper_of_spikingbrain_prints():
    """1.13 spikes times 0.03 pJ = 0.034 pJ; 97.7 % below an fp16 MAC, 85.2 % below an int8 MAC."""
    constants = read_constants()
    one = Network((Site(1, 1, active=0.816, rate=1.13, bits=4, kind="code"),))
    spiking, fp16, int8 = (
        one.energy(column, "arithmetic", constants)["products"] for column in ("spiking", "fp16_dense", "int8_dense")
    )
    assert round(spiking, 3) == 0.034 and fp16 == pytest.approx(1.5) and int8 == pytest.approx(0.23)
    assert round(100 * (1 - spiking / fp16), 1) == 97.7
    assert round(100 * (1 - round(spiking, 3) / int8), 1) == 85.2  # of the rounded 0.034; 85.3 of 0.0339


def test_columns_by_hand():
    """A site of 200 inputs and 10 outputs, half of the inputs active with 3 spikes each, and some shared work."""
    site = Site(200, 10, active=0.5, rate=1.5, bits=4, kind="code")
    network = Network(
        (site,), Shared(fp16_macs=1000, fp32_macs=10, weights=900, keys_values=7, states=3, inputs=90, outputs=20)
    )
    scaling, quantising = 2 * 10 * 4.6, 200 * (3.7 + 0.9 + 0.9)
    shared = 1000 * 1.5 + 10 * 4.6
    products = {
        "fp16_dense": 2000 * 1.5,
        "int8_dense": 2000 * 0.23 + quantising + scaling,
        "int_k_dense": 2000 * (0.1 + 0.03) + quantising + scaling,
        "spiking": 2000 * 1.5 * 0.03 + quantising + scaling,
        "spiking_reread": 2000 * 1.5 * 0.03 + quantising + scaling,
    }
    scales = 2 * 10 * 4
    weights = {
        "fp16_dense": 4000, "int8_dense": 2000 + scales, "int_k_dense": 2000 + scales, "spiking": 1000 + scales,
        "spiking_reread": 3000 + scales,
    }  # fmt: skip
    events = 100 * (16 + 4) / 8
    activations = {
        "fp16_dense": 400,
        "int8_dense": 200,
        "int_k_dense": 100,
        "spiking": events,
        "spiking_reread": events,
    }
    constants = read_constants()
    for column in COLUMNS:
        arithmetic = products[column] + shared
        assert sum(network.energy(column, "arithmetic", constants).values()) == pytest.approx(arithmetic)
        traffic = (activations[column] + 2 * (90 + 20)) * 2.5 + (2 * 7 + 8 * 3) * 12.5
        for how, byte in (("weights_in_sram", 12.5), ("weights_in_dram", 160)):
            total = arithmetic + traffic + (weights[column] + 2 * 900) * byte
            assert sum(network.energy(column, how, constants).values()) == pytest.approx(total)


def test_break_even_is_where_both_cost_the_same():
    constants = read_constants()
    network = Network(
        (Site(300, 40, active=0.4, rate=0.7, bits=5, kind="code"), Site(64, 9, 0.5, 0.9, 2.0, 9, "code")),
        Shared(fp16_macs=500, weights=500, membranes=10),
    )
    for how in ACCOUNTINGS:
        for column in ("spiking", "spiking_reread"):
            for against in ("fp16_dense", "int8_dense", "int_k_dense"):
                scale = network.break_even(column, against, how, constants)
                ours = sum(network.energy(column, how, constants, scale).values())
                assert ours == pytest.approx(sum(network.energy(against, how, constants).values()), rel=1e-9)
    # Of one site, by hand: r 0.03 = 0.23 plus the difference in coding, none here.
    alone = Network((Site(100, 10, active=0.5, rate=1.0, bits=8, kind="code"),))
    assert alone.break_even("spiking", "int8_dense", "arithmetic", constants) == pytest.approx(0.23 / 0.03)
    silent = Network((Site(100, 10, active=0.0, rate=0.0, bits=1, kind="code"),))
    assert silent.break_even("spiking", "int8_dense", "arithmetic", constants) == float("inf")
    costly = Network((Site(100, 1, active=0.1, rate=0.1, bits=1, kind="neuron_code"),))
    assert costly.break_even("spiking", "int8_dense", "arithmetic", constants) is None


def test_the_model_is_read_from_the_spikes(make_pair, tokenizer, prose):
    result, spikes = estimated(make_pair(num_hidden_layers=2)[0], tokenizer, prose)
    network = network_of(spikes, "bitwise")
    assert network.rate == pytest.approx(
        spikes["totals"]["synops_per_token"]["bitwise"] / sum(site.macs for site in network.sites)
    )
    assert network.active() == pytest.approx(1 - spikes["totals"]["silent_share_reads"])
    assert result["form"] == "bitwise" and len(result["columns"]) == 15 and len(result["break_even"]) == 18
    for row in result["columns"]:
        assert row["total"] == pytest.approx(sum(row[part] for part in energy.PARTS))
    assert energy.summary(result)["energy over int8 dense, arithmetic (ratio, estimate)"] < 1
    page = "\n".join(energy.page(result))
    assert page.count("estimate") > 20 and "None" not in page and "nan" not in page


@pytest.mark.parametrize(
    "changes, form",
    [
        ({"mixers": "egru", "spike_sites": []}, "bitwise"),
        ({"spike_sites": ["qkv", "down"], "spike_neuron": "lif", "spike_code": "ternary"}, "unary"),
        ({"spike_sites": ["mixer_out"]}, "bitwise"),
        ({}, None),
    ],
    ids=["events", "neurons", "unread", "no-sites"],
)
def test_other_models(changes, form, tokenizer, prose):
    result, _ = estimated(small_model(torch.float32, num_hidden_layers=1, **changes), tokenizer, prose)
    assert result["form"] == form
    assert {row["column"] for row in result["columns"]} == set(COLUMNS if form else COLUMNS[:2])
    assert "estimate" in "\n".join(energy.page(result)) and set(energy.figures(result)) == {"energy.png"}


def test_own_constants_change_the_estimate(make_pair, tokenizer, prose, tmp_path):
    model = make_pair(num_hidden_layers=1)[0]
    content = yaml.safe_load(CONSTANTS.read_text())
    for constant in content["constants"].values():
        constant["pj"] *= 3
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content | {"name": "mine"}))
    (own, _), (usual, _) = (estimated(model, tokenizer, prose, p) for p in (str(path), None))
    assert own["constants"]["name"] == "mine"
    for one, other in zip(own["columns"], usual["columns"]):
        assert one["total"] == pytest.approx(3 * other["total"])


def test_wrong_constants_are_refused(tmp_path):
    content = yaml.safe_load(CONSTANTS.read_text())
    constant, rest = (
        content["constants"]["int8_add"],
        {k: v for k, v in content["constants"].items() if k != "int8_add"},
    )
    cases = {
        "expected the keys name, constants, address_bits; got name": {"name": "x"},
        "constants must be a dict": content | {"constants": [1]},
        "address_bits must not be negative": content | {"address_bits": -1},
        "the constant int8_add is missing": content | {"constants": rest},
        "the constant int9_add is unknown": content | {"constants": content["constants"] | {"int9_add": constant}},
        "pj of int8_add must be a number of picojoules": content
        | {"constants": rest | {"int8_add": constant | {"pj": -1}}},
        "source of int8_add must be a text": content | {"constants": rest | {"int8_add": constant | {"source": ""}}},
        "int8_add must be written as": content | {"constants": rest | {"int8_add": 0.03}},
    }
    path = tmp_path / "constants.yaml"
    for message, wrong in cases.items():
        path.write_text(yaml.safe_dump(wrong))
        with pytest.raises(ValueError, match=re.escape(message)):
            read_constants(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not a YAML file"):
        read_constants(path)
    with pytest.raises(ValueError, match="No such file"):
        read_constants(tmp_path / "none.yaml")
