"""Timestep reduction: when, what it sets, and what a model then computes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from small_models import SITES, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.spiking import execute_trains, spike_groups
from spikelm.spiking.schedule import HALVING, CountReduction, count_at, limit_counts


def test_stages_are_of_equal_length():
    assert [count_at(step, 10) for step in range(12)] == [16, 16, 8, 8, 4, 4, 2, 2, 1, 1, 1, 1]
    assert [count_at(step, 4, (3, 1)) for step in range(4)] == [3, 3, 1, 1]
    assert {count_at(step, 1001) for step in range(1001)} == set(HALVING)


@pytest.mark.parametrize(
    ("step", "steps", "stages"),
    [(0, 10, ()), (0, 10, (4, 4)), (0, 10, (2, 4)), (0, 10, (2, 0)), (-1, 10, (2, 1)), (0, 1, (2, 1))],
)
def test_schedules_that_are_none(step, steps, stages):
    with pytest.raises(ValueError, match="stages"):
        count_at(step, steps, stages)


@pytest.mark.parametrize("neuron", ["none", "dsn"])
@torch.no_grad()
def test_a_reduced_model_runs_on_that_many_time_steps(neuron, tmp_path):
    """Trains of `count` slots are enough, thresholds stay, and a saved model stays reduced."""
    model = small_model(
        spike_sites=SITES, spike_neuron=neuron, spike_code="ternary", spike_threshold="learned", spike_magnitude=0.3
    )
    thresholds = [group.site.magnitude.clone() for group in spike_groups(model)]
    ids, seen = torch.randint(0, 97, (2, 9)), []
    for group in spike_groups(model):
        group.site.observers.append(lambda site, counts, *_: seen.append(counts.abs().max().item()))
    for count in HALVING:
        seen.clear()
        limit_counts(model, count)
        logits = model(ids).logits
        assert max(seen) == count if count <= 4 else max(seen) <= count
        with execute_trains(model, slots=count):
            assert (model(ids).logits - logits).abs().max() < 1e-9
    assert all(torch.equal(group.site.magnitude, old) for group, old in zip(spike_groups(model), thresholds))
    model.save_pretrained(tmp_path)
    again = SpikeLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)(ids).logits
    assert (again - logits).abs().max() < 1e-9


def test_models_without_counts_and_counts_below_one():
    for changes in ({}, {"spike_sites": SITES, "spike_neuron": "lif", "spike_code": "binary"}):
        with pytest.raises(ValueError, match="no sites that count"):
            limit_counts(small_model(**changes), 2)
    with pytest.raises(ValueError, match="at least 1"):
        limit_counts(small_model(spike_sites=SITES), 0)


def test_a_trainer_goes_through_the_stages(tmp_path):
    model, seen = small_model(dtype=torch.float32, spike_sites=SITES, spike_threshold="learned"), []
    site = model.model.layers[0].mixer.qkv_site
    site.observers.append(lambda site, *_: seen.append(site.max_count))
    row = torch.randint(0, 97, (9,))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=1, report_to="none", save_strategy="no", use_cpu=True
    )
    data = [{"input_ids": row, "labels": row}] * 6
    Trainer(model, arguments, train_dataset=data, callbacks=[CountReduction((4, 2, 1))]).train()
    assert seen == [4, 4, 2, 2, 1, 1] and model.config.spike_max_count == 1
