import pytest
import torch

from small_models import SITES, small_model
from spikelm.eval import controls
from spikelm.eval.controls import MagnitudeProfile, match_share
from spikelm.spiking import SpikeStatistics, spike_groups


@pytest.fixture
def model():
    return small_model(spike_sites=SITES, spike_k=4.0, spike_dead_zone=0.2)


@pytest.fixture
def ids():
    return torch.randint(97, (1, 48))


def state(model):
    sites = {group.path: group.site for group in spike_groups(model)}
    return {
        path: (site.k.clone(), site.dead_zone.clone(), site.substitute, len(site._forward_hooks))
        for path, site in sites.items()
    }


def paths(model, value):
    return {group.path: value for group in spike_groups(model)}


def contexts(model):
    return {
        "uniform": controls.uniform_dead_zone(model, 0.7),
        "plain": controls.plain_code(model),
        "allocated": controls.allocated(model, {g.path: torch.rand(g.site.width) for g in spike_groups(model)}),
        "teal": controls.teal(model, paths(model, 0.3)),
        "int": controls.int_levels(model, paths(model, 5)),
    }


@torch.no_grad()
def inputs_of(model, ids):
    """Path -> what each site reads and what its linears read in a pass."""
    seen = {}
    hooks = [
        group.site.register_forward_hook(lambda site, args, out, path=group.path: seen.update({path: (args[0], out)}))
        for group in spike_groups(model)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def silent_share(model, ids, **inputs):
    with SpikeStatistics(model) as statistics:
        model(ids, **inputs)
    return statistics.summary()["silent_share_reads"]


@pytest.mark.parametrize("name", ["uniform", "plain", "allocated", "teal", "int"])
def test_controls_change_the_model_and_leave_it_as_it_was_also_after_an_error(model, ids, name):
    before, logits = state(model), model(ids).logits
    with pytest.raises(RuntimeError, match="on purpose"), contexts(model)[name]:
        assert not torch.equal(model(ids).logits, logits)
        raise RuntimeError("on purpose")
    after = state(model)
    assert before.keys() == after.keys()
    for path, (k, dead_zone, substitute, hooks) in before.items():
        assert torch.equal(k, after[path][0]) and torch.equal(dead_zone, after[path][1])
        assert after[path][2:] == (substitute, hooks)
    assert torch.equal(model(ids).logits, logits)


def test_spike_controls_set_what_they_say(model):
    for i, group in enumerate(spike_groups(model)):
        group.site.k.fill_(2.0 + i)  # as a calibration does
    with controls.uniform_dead_zone(model, 0.7):
        assert all(float(g.site.dead_zone) == pytest.approx(0.7) and float(g.site.k) == 4 for g in spike_groups(model))
    with controls.plain_code(model):
        assert all(float(g.site.dead_zone) == 0 and float(g.site.k) == 3 for g in spike_groups(model))


def test_teal_keeps_large_values_exact_and_zeroes_the_rest(model, ids):
    with controls.teal(model, paths(model, 0.3)):
        for x, out in inputs_of(model, ids).values():
            assert torch.equal(out, torch.where(x.abs() >= 0.3, x, 0.0)) and bool((out == 0).any())


def test_the_integer_control_rounds_each_token_to_its_levels(model, ids):
    with controls.int_levels(model, paths(model, 5)):
        for x, out in inputs_of(model, ids).values():
            step = x.abs().amax(-1, keepdim=True) / 5
            levels = out / step
            assert torch.allclose(levels, levels.round(), atol=1e-9) and levels.abs().max() == pytest.approx(5)
            assert ((out - x).abs() <= step / 2 + 1e-12).all()


@pytest.mark.parametrize(("largest", "bits"), [(1, 2), (3, 3), (7, 4), (8, 5), (127, 8), (1000, 11)])
def test_bits_hold_all_levels(largest, bits):
    assert controls.bits_of(largest) == bits


def test_the_silent_share_of_a_substitute_is_counted_without_padding(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    with controls.teal(model, paths(model, 0.3)):
        seen = inputs_of(model, ids[:, 11:])
        counted = silent_share(model, ids, attention_mask=mask)
    silent = reads = 0
    for group in spike_groups(model):
        zeros = seen[group.path][1] == 0
        silent += int(zeros.sum()) * group.fan_out
        reads += zeros.numel() * group.fan_out
    assert counted == pytest.approx(silent / reads, rel=1e-9)


def test_a_profile_finds_thresholds_and_dead_zones(model, ids):
    profile = MagnitudeProfile(model)
    with torch.no_grad(), profile.collecting():
        model(ids)
    with controls.substituted(model, lambda group: lambda x: x):
        seen = {path: x for path, (x, _) in inputs_of(model, ids).items()}
    for path, threshold in profile.thresholds(0.4).items():
        assert float((seen[path].abs() < threshold).double().mean()) == pytest.approx(0.4, abs=0.01)

    def share(dead_zone):
        silent = reads = 0
        for group in spike_groups(model):
            x = seen[group.path]
            u = x.abs() / x.abs().mean(-1, keepdim=True)
            silent += int((u < max(dead_zone, 0.5 / 4)).sum()) * group.fan_out
            reads += u.numel() * group.fan_out
        return silent / reads

    assert share(profile.dead_zone(0.4)) == pytest.approx(0.4, abs=0.005)
    assert profile.silent_share(0.3) == pytest.approx(share(0.3), abs=0.005)
    assert profile.dead_zone(0.01) == 0  # rounding alone silences more


def test_a_share_is_matched_by_the_running_model(model, ids):
    profile = MagnitudeProfile(model)
    with torch.no_grad(), profile.collecting():
        model(ids)

    def measure(dead_zone):
        with controls.uniform_dead_zone(model, dead_zone):
            return silent_share(model, ids)

    assert measure(match_share(0.45, profile.dead_zone, measure)) == pytest.approx(0.45, abs=0.004)


def test_matching_corrects_a_biased_expectation_and_stops_when_close():
    asked = []

    def measure(setting):
        asked.append(setting)
        return setting - 0.05

    assert match_share(0.3, lambda share: share, measure) == pytest.approx(0.35)
    assert len(asked) == 2
