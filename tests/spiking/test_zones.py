"""Dead zones on a schedule and under control: functions of the step, the share measured, and exact resumption."""

from types import SimpleNamespace

import pytest
import torch

from small_models import SITES, small_model
from spikelm.spiking import SpikeStatistics, spike_groups
from spikelm.spiking.zones import LARGEST, DeadZoneSchedule, ShareMeter, SilentShareControl


def make(**changes):
    """A model in training mode whose zones differ from channel to channel."""
    fields = {"spike_sites": SITES, "spike_dead_zone": 0.3, "spike_dead_zone_per_channel": True}
    model = small_model(**fields | changes).train()
    for group in spike_groups(model):
        group.site.dead_zone.mul_(0.5 + torch.rand(group.site.width))
    return model


def zones(model):
    return torch.cat([group.site.dead_zone for group in spike_groups(model)]).clone()


def at(step, steps=8):
    return SimpleNamespace(global_step=step, max_steps=steps, stateful_callbacks={})


def test_zones_follow_the_steps_made_and_nothing_else():
    model = make()
    first, schedule = zones(model), DeadZoneSchedule(start=0.25, over=0.5)
    schedule.on_init_end(None, None, None, model=model)
    model._apply(torch.clone)  # as if it moved to another device
    schedule.on_train_begin(None, at(0), None)
    assert torch.equal(zones(model), first * 0.25)
    for step, factor in ((3, 0.8125), (1, 0.4375), (4, 1.0), (8, 1.0)):
        schedule.on_step_end(None, at(step), None)
        assert torch.equal(zones(model), first * factor)


def test_a_resumed_schedule_goes_on_and_knows_its_own_checkpoint():
    model, again = make(), make()
    again.load_state_dict(model.state_dict())
    run, resumed = DeadZoneSchedule(start=0.1), DeadZoneSchedule(start=0.1)
    for schedule, its in ((run, model), (resumed, again)):
        schedule.on_init_end(None, None, None, model=its)
    run.on_step_end(None, at(3), None)
    with pytest.raises(ValueError, match="not those of this model and schedule"):
        resumed.on_train_begin(None, at(3), None)
    again.load_state_dict(model.state_dict())
    resumed.on_train_begin(None, at(3), None)
    for step in (4, 5):
        for schedule in (run, resumed):
            schedule.on_step_end(None, at(step), None)
        assert torch.equal(zones(model), zones(again))


def test_the_meter_reads_what_the_statistics_count():
    """Weighted by reads; padding left out; over several passes; only in training; also where sites are annealed."""
    model = make()
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    meter = ShareMeter()
    for group in spike_groups(model):
        group.site.register_forward_hook(lambda site, args, output: torch.lerp(args[0], output, 0.5))
    meter.watch(model)
    with SpikeStatistics(model) as statistics:
        model(ids, attention_mask=mask)
        model(ids[:1])
    model.eval()(ids)
    assert meter.read() == pytest.approx(statistics.summary()["silent_share_reads"], abs=1e-12)
    with pytest.raises(ValueError, match="no silent share"):
        meter.read()
    meter.leave()


def control(model, **fields):
    controller = SilentShareControl(**fields)
    controller.on_init_end(None, None, None, model=model)
    return controller


def test_the_factor_answers_what_is_missed():
    controller = control(make(), target=0.5, over=0.5, gain=2.0)
    controller.correct(0.2, 0, 8)
    assert controller.start == 0.2 and controller.log_factor == 0.0
    controller.correct(0.2, 2, 8)  # 0.35 is asked half way
    assert controller.log_factor == pytest.approx(0.3)
    controller.correct(0.6, 8, 8)
    assert controller.log_factor == pytest.approx(0.1)
    for _ in range(99):
        controller.correct(0.0, 8, 8)
    assert controller.factor == pytest.approx(LARGEST)


@torch.no_grad()
def test_the_share_follows_its_course():
    model, state = make(), at(0, 30)
    first, controller = zones(model), control(model, target=0.6, over=0.5, gain=2.0)
    controller.on_train_begin(None, state, None, model=model)
    shares = []
    for step in range(30):
        with SpikeStatistics(model) as statistics:
            model(torch.randint(0, 97, (2, 16)))
        shares.append(statistics.summary()["silent_share_reads"])
        state.global_step = step + 1
        controller.on_step_end(None, state, None)
    controller.on_train_end(None, state, None)
    assert shares[0] < 0.4 and shares[15] < 0.6 and all(abs(share - 0.6) < 0.04 for share in shares[-8:])
    assert torch.equal(zones(model), first * controller.factor)
    assert not any(group.site._forward_hooks for group in spike_groups(model))


@torch.no_grad()
def test_a_resumed_control_goes_on_bit_for_bit():
    batches = [torch.randint(0, 97, (2, 9)) for _ in range(6)]
    model, again, state = make(), make(), at(0, 6)
    again.load_state_dict(model.state_dict())
    run, resumed = (control(its, target=0.6, over=0.5) for its in (model, again))
    run.on_train_begin(None, state, None, model=model)
    for step, batch in enumerate(batches):
        if step == 3:
            again.load_state_dict(model.state_dict())
            later = at(3, 6)
            with pytest.raises(ValueError, match="not those of this model and schedule"):
                resumed.on_train_begin(None, later, None, model=again)  # without what was saved
            later.stateful_callbacks = dict(state.stateful_callbacks)
            resumed.on_train_begin(None, later, None, model=again)
        pairs = [(run, model, state)] + ([(resumed, again, later)] if step >= 3 else [])
        for controller, its, its_state in pairs:
            its(batch)
            its_state.global_step = step + 1
            controller.on_step_end(None, its_state, None)
    assert resumed.log_factor == run.log_factor and resumed.start == run.start
    assert torch.equal(zones(model), zones(again))


@pytest.mark.parametrize("fields", [{"target": 0.0}, {"target": 0.5, "gain": 0.0}, {"target": 0.5, "over": 2.0}])
def test_controls_that_are_none(fields):
    with pytest.raises(ValueError, match="must be"):
        SilentShareControl(**fields)


def test_zones_that_no_factor_moves():
    for changes in ({"spike_dead_zone": 0.0}, {"spike_sites": None}):
        with pytest.raises(ValueError, match="no dead zones above 0"):
            control(make(**changes), target=0.5)
    with pytest.raises(ValueError, match="start must be"):
        DeadZoneSchedule(start=-0.1)
