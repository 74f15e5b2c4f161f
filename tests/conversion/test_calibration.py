import math

import pytest
import torch

from spikelm.conversion.allocation import LARGEST, ActivationProfile
from spikelm.conversion.calibration import _substituted, calibrate
from spikelm.conversion.checkpoints import read_json
from spikelm.conversion.convert import convert
from spikelm.conversion.texts import calibration_sample, evaluation_sample
from spikelm.spiking.site import spike_groups
from tests.conversion.test_sources import words
from tests.conversion.tiny import VOCAB, gemma2, llama


def text_ids(count: int = 2048) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(1))


def silent_share(model, ids) -> float:
    """Measured from outside: zeros of the counts, weighted by the weights that each input reads."""
    saved = total = 0
    groups = list(spike_groups(model))
    seen = {group.path: [] for group in groups}
    for group in groups:
        group.site.observers.append(lambda site, counts, *_, path=group.path: seen[path].append(counts == 0))
    with torch.no_grad():
        model(ids)
    for group in groups:
        group.site.observers.clear()
        zeros = torch.cat([t.flatten(0, 1) for t in seen[group.path]])
        reads = sum(linear.out_features for linear in group.readers.values())
        saved, total = saved + int(zeros.sum()) * reads, total + zeros.numel() * reads
    return saved / total


@pytest.mark.parametrize("threshold", ["token", "calibrated"])
@pytest.mark.parametrize("allocation", ["gradient", "uniform"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_silent_share_is_met_on_other_text(share, allocation, threshold):
    model = convert(
        llama(),
        silent_share=share,
        allocation=allocation,
        threshold=threshold,
        calibration_text=text_ids(),
        progress=False,
    )
    fresh = torch.randint(0, VOCAB, (16, 64), generator=torch.Generator().manual_seed(7))
    assert silent_share(model, fresh) == pytest.approx(share, abs=0.02)
    assert model.conversion["calibration"]["silent_share_reads"] == pytest.approx(share, abs=0.01)


def test_uniform_is_one_dead_zone():
    model = convert(llama(), silent_share=0.4, allocation="uniform", calibration_text=text_ids(), progress=False)
    zones = torch.cat([group.site.dead_zone for group in spike_groups(model)])
    assert zones.shape == (16,)
    assert bool((zones == zones[0]).all())


def test_gla_layers_are_calibrated_too():
    model = convert(llama(), mixers="gla+swa", silent_share=0.4, calibration_text=text_ids(), progress=False)
    assert silent_share(model, text_ids().view(-1, 64)[:8]) == pytest.approx(0.4, abs=0.02)


def test_dead_zones_follow_fan_out_and_importance():
    model = convert(llama(), silent_share=0.4, calibration_text=text_ids(), progress=False)
    groups = list(spike_groups(model))
    profile = ActivationProfile(groups)
    generator = torch.Generator().manual_seed(0)
    for index, group in enumerate(groups):
        profile.see(index, torch.randn(1, 300, group.site.width, generator=generator))
        profile.importance[index] = torch.rand(group.site.width, generator=generator).double() + 0.01
    zones = profile.by_gradient(0.45)
    multipliers = torch.cat(
        [
            (zone.double().square() * importance / rows / group.fan_out)[zone < LARGEST]
            for zone, importance, rows, group in zip(zones, profile.importance, profile.rows, groups, strict=True)
        ]
    )
    assert multipliers.std() / multipliers.mean() < 1e-5, "one price of silence everywhere"
    assert profile.share(zones) == pytest.approx(0.45, abs=1e-4)


def test_counts_follow_what_rounding_costs():
    model = convert(llama(), k=4.0, progress=False)
    groups = list(spike_groups(model))
    profile = ActivationProfile(groups)
    generator = torch.Generator().manual_seed(0)
    for index, group in enumerate(groups):
        profile.rows[index] = 10
        profile.importance[index] = torch.rand(group.site.width, generator=generator).double() * (1 + index)
    reads = torch.tensor([group.fan_out * group.site.width for group in groups]).double()
    prices = torch.stack([importance.sum() for importance in profile.importance])
    best = torch.tensor(profile.counts_by_gradient()).double()

    def cost(k):
        return float((prices / k.square()).sum())

    assert float((best * reads).sum() / reads.sum()) == pytest.approx(4.0), "as many weights added by spikes"
    assert cost(best) < cost(torch.full_like(best, 4.0))
    for _ in range(20):  # no other counts with the same mean cost less
        other = best * (1 + 0.1 * torch.rand(len(best), generator=generator))
        other *= 4.0 * reads.sum() / (other * reads).sum()
        assert cost(other) > cost(best)


def test_calibrated_tensors_are_saved_and_recorded(tmp_path):
    model = convert(llama(), tmp_path / "out", silent_share=0.4, calibration_text=text_ids(), progress=False)
    again = type(model).from_pretrained(tmp_path / "out")
    record = read_json(tmp_path / "out" / "conversion.json")["calibration"]
    for one, two in zip(spike_groups(model), spike_groups(again), strict=True):
        for name, tensor in one.site.named_buffers():
            assert torch.equal(tensor, two.site.get_buffer(name))
        assert record["k"][f"{one.layer_idx}.{one.name}"] == pytest.approx(float(one.site.k), abs=1e-3)
    assert len(set(record["k"].values())) > 1


def test_share_is_that_of_the_activations():
    groups = list(spike_groups(convert(llama(), k=4.0, progress=False)))[:2]
    profile = ActivationProfile(groups)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3000, group.site.width, generator=generator) for group in groups]
    for index, x in enumerate(inputs):
        profile.see(index, x)
    for zone in (0.0, 0.31, 0.9):
        saved = total = 0.0
        for x, group in zip(inputs, groups, strict=True):
            u = x.abs() / x.abs().mean(-1, keepdim=True)
            saved += float((u < max(zone, 0.125)).sum()) * group.fan_out
            total += u.numel() * group.fan_out
        assert profile.share([torch.tensor([zone])] * 2) == pytest.approx(saved / total, abs=0.004)


def test_importance_is_the_squared_gradient_at_the_site():
    model = convert(llama(), progress=False)
    group = next(group for group in spike_groups(model) if group.path.endswith("layers.1.ffn.down_site"))
    profile = ActivationProfile([group])
    x = torch.randn(1, 5, group.site.width, requires_grad=True)
    weight = torch.randn(1, 5, group.site.width)
    with _substituted([group], profile.see):
        (group.site(x) * weight).sum().backward()
    expected = (weight * x.detach().abs().mean(-1, keepdim=True)).square().sum((0, 1))
    torch.testing.assert_close(profile.importance[0], expected.double(), rtol=1e-5, atol=0)


def test_gradient_allocation_costs_less_than_uniform():
    """On a model whose channels differ in importance: half of what every reader reads counts for almost nothing."""
    source = llama()
    with torch.no_grad():
        for layer in source.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[:, ::2] *= 0.02
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj):
                linear.weight[:, ::2] *= 0.02
    ids = torch.randint(0, VOCAB, (16, 64), generator=torch.Generator().manual_seed(7))
    costs = {}
    for allocation in ("gradient", "uniform"):
        model = convert(source, silent_share=0.4, allocation=allocation, calibration_text=text_ids(), progress=False)
        with torch.no_grad():
            ours, theirs = model(ids).logits.log_softmax(-1), source(ids).logits.log_softmax(-1)
        costs[allocation] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert costs["gradient"] < 0.7 * costs["uniform"]


def test_stored_magnitudes_are_the_means_of_the_float_model():
    source = llama()
    model = convert(source, threshold="calibrated", calibration_text=text_ids(640), progress=False)
    seen = []
    source.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().mean()))
    with torch.no_grad():
        source(text_ids(640).view(10, 64))
    assert model.model.layers[2].ffn.down_site.magnitude.item() == pytest.approx(float(seen[0]), rel=1e-5)
    assert not [group for group in spike_groups(model) if group.site.magnitude.requires_grad]


def test_calibration_leaves_no_trace_and_is_repeatable():
    first = convert(llama(), silent_share=0.4, calibration_text=text_ids(), progress=False)
    second = convert(llama(), silent_share=0.4, calibration_text=text_ids(), progress=False)
    for one, two in zip(spike_groups(first), spike_groups(second), strict=True):
        assert torch.equal(one.site.dead_zone, two.site.dead_zone)
        assert one.site.substitute is None and not one.site.observers
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.grad is None for parameter in first.parameters())


@pytest.mark.parametrize("share", [0.01, 0.999])
def test_share_that_cannot_be_reached(share):
    with pytest.raises(ValueError, match=r"cannot be reached: rounding alone silences 0\.1"):
        convert(llama(), silent_share=share, calibration_text=text_ids(), progress=False)


def test_text_that_is_too_short():
    with pytest.raises(ValueError, match="has 9 tokens"):
        convert(llama(), silent_share=0.4, calibration_text=text_ids(9), progress=False)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        convert(llama(), silent_share=0.4, calibration_text="some text", progress=False)
    text = " ".join(f"w{i}" for i in text_ids().tolist())
    model = convert(llama(), silent_share=0.4, calibration_text=text, tokenizer=words(), progress=False)
    assert model.conversion["calibration"]["text"] == "the text given"


def test_built_in_text_is_the_default():
    model = convert(gemma2(), silent_share=0.4, tokenizer=words(), progress=False)
    assert model.conversion["calibration"]["tokens"] == 4096
    assert "Python" in model.conversion["calibration"]["text"]


def test_samples_share_no_paragraph():
    one, two = calibration_sample(), evaluation_sample()
    assert len(one) > 150_000 and len(two) > 100_000
    assert not set(one.split("\n\n")) & set(two.split("\n\n"))
    assert calibration_sample() == one


def test_calibrate_can_be_called_again():
    model = convert(llama(), silent_share=0.3, calibration_text=text_ids(), progress=False)
    result = calibrate(model, None, text_ids(), silent_share=0.5, progress=False)
    assert result["silent_share_reads"] == pytest.approx(0.5, abs=0.01)
    assert math.isclose(sum(result["silent_share"].values()) / 16, 0.5, abs_tol=0.2)
