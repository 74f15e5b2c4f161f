"""Annealing and timestep reduction: when, what they set, and what a model then computes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from small_models import SITES, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.spiking import execute_trains, spike_groups
from spikelm.spiking.schedule import HALVING, CodeAnnealing, CountReduction, count_at, limit_counts, ramp


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


def test_a_ramp_is_a_function_of_the_step():
    assert [ramp(step, 8, 0.5) for step in range(9)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert ramp(7, 8, 1.0) == 7 / 8 and ramp(8, 8, 1.0) == 1
    for over in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match="over must be"):
            ramp(0, 8, over)


@pytest.mark.parametrize("neuron", ["none", "lif", "dsn"])
def test_annealed_sites_mix_input_and_code_in_training_only(neuron):
    model = small_model(spike_sites=SITES, spike_neuron=neuron, spike_code="ternary").train()
    site, x = model.model.layers[0].ffn.down_site, torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    code = site(x).detach()
    annealing, state = CodeAnnealing(over=0.5), SimpleNamespace(global_step=0, max_steps=8)
    annealing.on_train_begin(None, state, None, model=model)
    for step in (0, 1, 2, 4, 8):
        state.global_step = step
        annealing.on_step_end(None, state, None)
        a = min(1.0, step / 4)
        assert (site(x) - ((1 - a) * x + a * code)).abs().max() < 1e-12
        assert torch.equal(site.eval()(x), code)
        site.train()
    assert torch.equal(site(x), code)
    annealing.on_train_end(None, state, None)
    assert not site._forward_hooks


def test_the_gradient_of_a_mixture_is_that_of_its_parts():
    model = small_model(spike_sites=SITES, spike_max_count=2).train()
    site, annealing = model.model.layers[0].mixer.o_site, CodeAnnealing(over=1.0)
    annealing.on_train_begin(None, SimpleNamespace(global_step=3, max_steps=8), None, model=model)
    x, dy = torch.randn(4, 32, dtype=torch.float64, requires_grad=True), torch.randn(4, 32, dtype=torch.float64)
    (mixed,) = torch.autograd.grad(site(x), x, dy)
    annealing.on_train_end(None, None, None)
    (coded,) = torch.autograd.grad(site(x), x, dy)
    assert (coded == 0).any() and (mixed - (5 / 8 * dy + 3 / 8 * coded)).abs().max() < 1e-12


def test_a_model_without_sites_is_not_annealed():
    with pytest.raises(ValueError, match="no spike sites to anneal"):
        CodeAnnealing().on_train_begin(None, SimpleNamespace(global_step=0, max_steps=8), None, model=small_model())
