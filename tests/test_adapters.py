"""Adapters: what trains, what the folder holds, what comes back from it, and the merge."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import spikelm
from small_models import small_model
from spikelm.adapters import add_adapter, merge_adapter, save_adapter
from spikelm.conversion.keys import new_parameters
from spikelm.spiking import SpikeStatistics, execute_trains, spike_groups
from tests.conversion.tiny import VOCAB, llama

PLAN = {
    "mixers": ["gla", "attention", "window_linear", "delta"],
    "window": 4,
    "dead_zone": 0.4,
    "threshold": "calibrated",
}
CALIBRATION = torch.arange(64) * 7 % VOCAB


@pytest.fixture
def source():
    return llama(tie_word_embeddings=True).double()


def converted(source):
    return spikelm.convert(source, **PLAN, calibration_text=CALIBRATION, progress=False)


def trained(model):
    """Two steps of a training, dead zones that moved with it."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        ids = torch.randint(0, VOCAB, (2, 12))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for group in spike_groups(model):
        group.site.dead_zone.mul_(1.25)
    return model.eval()


def test_an_adapter_changes_nothing_at_first_and_trains_nothing_of_the_base(source):
    model, ids = converted(source), torch.randint(0, VOCAB, (2, 12))
    with torch.no_grad():
        before = model(ids).logits
        assert torch.equal(add_adapter(model, rank=2, targets=["q_proj", "down_proj"])(ids).logits, before)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trains if ".lora_" in name}
    assert adapted == {"q_proj", "down_proj"}
    new = new_parameters(model.config) & {name for name, _ in model.named_parameters()}
    assert {name for name in trains if ".lora_" not in name} == new
    first = {name: p.clone() for name, p in model.named_parameters() if name in new}
    trained(model)
    assert all(torch.equal(model.get_parameter(name), old) for name, old in frozen.items())
    assert [name for name, old in first.items() if torch.equal(model.get_parameter(name), old)] == []


@torch.no_grad()
def test_base_and_folder_give_the_spiking_model(source, tmp_path):
    with torch.enable_grad():
        model = trained(add_adapter(converted(source), rank=2, alpha=3))
    save_adapter(model, tmp_path / "adapter", base="tiny")
    ids = torch.randint(0, VOCAB, (2, 12))
    logits = model(ids).logits
    fresh, kept = converted(source), spikelm.convert(source, mixers="keep", sites="none", progress=False)
    fresh.save_pretrained(tmp_path / "fresh")
    for base in (source, fresh, kept, tmp_path / "fresh"):
        again = spikelm.load_adapter(base, tmp_path / "adapter", progress=False)
        assert not again.training and torch.equal(again(ids).logits, logits)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") and ".lora_" in name for name in stored)
    assert set(load_file(tmp_path / "adapter" / "new.safetensors")) == new_parameters(model.config)


@torch.no_grad()
def test_merging_is_exact_and_leaves_a_plain_model(source):
    with torch.enable_grad():
        model = trained(add_adapter(converted(source), rank=2, alpha=3))
    ids = torch.randint(0, VOCAB, (2, 12))
    sites = {group.path: group.site for group in spike_groups(model)}
    logits = model(ids).logits
    merged = merge_adapter(model)
    assert (merged(ids).logits - logits).abs().max() < 1e-9
    assert {group.path: group.site for group in spike_groups(merged)} == sites
    assert merged.state_dict().keys() == converted(source).state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_adapter(merged)


@torch.no_grad()
def test_statistics_and_trains_see_the_matrices_behind_the_pairs(source):
    ids = torch.randint(0, VOCAB, (2, 12))
    model = converted(source)
    with SpikeStatistics(model) as before:
        model(ids)
    with torch.enable_grad():
        add_adapter(model, rank=2)
    with SpikeStatistics(model) as after:
        logits = model(ids).logits
    assert after.by_site() == before.by_site()
    assert after.summary()["silent_share_reads"] == before.summary()["silent_share_reads"]
    with execute_trains(model):
        assert (model(ids).logits - logits).abs().max() < 1e-9


@torch.no_grad()
def test_peft_reads_its_part_by_itself(source, tmp_path):
    from peft import PeftModel

    with torch.enable_grad():
        model = trained(add_adapter(converted(source), rank=2, alpha=3))
    save_adapter(model, tmp_path / "adapter")
    fresh, ids = converted(source), torch.randint(0, VOCAB, (2, 12))
    whole = load_file(tmp_path / "adapter" / "new.safetensors")
    assert not fresh.load_state_dict(whole, strict=False).unexpected_keys
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path / "adapter")(ids).logits, model(ids).logits)


def test_models_that_can_have_no_adapter(source, tmp_path):
    model = converted(source)
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(model, tmp_path / "adapter")
    for fields, message in (
        ({"rank": 0}, "rank of at least 1"),
        ({"alpha": 0.0}, "alpha above 0"),
        ({"targets": ["q"]}, "no linears q to adapt; it has "),
        ({"targets": []}, "no linears at all"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(model, **fields)
    for changes in (
        {"spike_sites": ["ffn_out"]},
        {"spike_sites": ["qkv"], "spike_neuron": "lif", "spike_code": "binary"},
    ):
        with pytest.raises(ValueError, match=r"this one has (ffn_out|lif)\."):
            add_adapter(small_model(**changes))
    add_adapter(model)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has an adapter itself"):
        spikelm.load_adapter(model, tmp_path / "adapter", progress=False)


def test_folders_and_bases_that_do_not_fit(source, tmp_path):
    with pytest.raises(ValueError, match=r"holds no new\.safetensors"):
        spikelm.load_adapter(source, tmp_path, progress=False)
    save_adapter(add_adapter(converted(source), rank=2), tmp_path / "adapter", base="tiny")
    other = llama(tie_word_embeddings=True)
    weight = other.model.layers[2].mlp.up_proj.weight.data
    weight += 0.05 * weight.square().mean().sqrt() * torch.randn_like(weight)
    with pytest.raises(ValueError, match=r"another base than this one \(tiny\): model.layers.2.ffn.up_proj"):
        spikelm.load_adapter(other, tmp_path / "adapter", progress=False)
    spikelm.load_adapter(source.bfloat16(), tmp_path / "adapter", progress=False)  # the same base, rounded
    config = tmp_path / "adapter" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"spike_threshold": "token"}))
    with pytest.raises(ValueError, match=r"does not hold what config\.json asks for"):
        spikelm.load_adapter(source, tmp_path / "adapter", progress=False)


def test_without_peft_it_is_asked_for(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'spikelm\[train\]'"):
        add_adapter(converted(source))
