"""Gradual spikes, noise and adapters in a run: what is trained and written, exact resumption, mistakes."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import ByT5Tokenizer, TrainerCallback

import spikelm
from spikelm.recipes import spikes
from spikelm.recipes.noise import GradientNoise, add_noise
from spikelm.recipes.run import run
from spikelm.recipes.spikes import KINDS, spike_callbacks
from spikelm.spiking import spike_groups
from tests.recipes.tiny_run import curve, tiny_data, tiny_settings

ALL = {
    "annealing": {"over": 0.7},
    "silent_share": {"target": 0.4, "over": 0.5, "gain": 2},
    "counts": {"stages": [8, 4]},
    "rate": {"weight": 0.5},
    "gradient_noise": {"scale": 0.01},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a model with dead zones, its head tied to the embeddings."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), ByT5Tokenizer(extra_ids=0)
    config = tiny_settings("unused").config | {"spike_dead_zone": 0.3, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = spikelm.SpikeLMForCausalLM(spikelm.SpikeLMConfig(vocab_size=len(tokenizer), **config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(base, out, **changes):
    return replace(tiny_settings(out), model=str(base), tokenizer=None, config={}, **changes)


class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 6:
            raise KeyboardInterrupt


def history(out):
    return curve(json.loads((out / "checkpoints" / "step-12" / "trainer_state.json").read_text())["log_history"])


CASES = {
    "all": {"spikes": ALL, "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]}},
    "dead_zone": {"spikes": {"dead_zone": {"start": 0.0, "over": 0.5}}},
}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Undisturbed runs, by name."""
    place = tmp_path_factory.mktemp("whole")
    for name, changes in CASES.items():
        run(settings_of(base, place / name, **changes), data=tiny_data)
    return place


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_stopped_goes_on_number_for_number(name, whole, base, tmp_path):
    stopped = settings_of(base, tmp_path, **CASES[name])
    with pytest.raises(KeyboardInterrupt):
        run(stopped, data=tiny_data, callbacks=[Killed()])
    run(stopped, data=tiny_data)
    assert history(tmp_path) == history(whole / name)
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (tmp_path, whole / name))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_of_them_do_what_they_say(whole, base):
    rows = [row for row in history(whole / "all") if "loss" in row]
    assert all(0 < row["rate"] < 0.5 for row in rows)
    assert all(row["loss"] == pytest.approx(row["rate"] + row["cross_entropy"], rel=1e-6) for row in rows)
    assert rows[-1]["silent_share_reads"] > rows[0]["silent_share_reads"] + 0.05
    before, after = (spikelm.SpikeLMForCausalLM.from_pretrained(f) for f in (base, whole / "all" / "model"))
    pairs = zip(spike_groups(before), spike_groups(after))
    factors = [new.site.dead_zone / old.site.dead_zone for old, new in pairs]
    assert factors[0] > 1.2 and all(torch.allclose(factor, factors[0], rtol=1e-6) for factor in factors)
    assert after.config.spike_max_count == 4


def test_a_zone_schedule_ends_with_the_zones_it_began_with(whole):
    stored = load_file(whole / "dead_zone" / "model" / "model.safetensors")
    assert all(tensor == torch.tensor(0.3) for name, tensor in stored.items() if name.endswith("dead_zone"))


@torch.no_grad()
def test_an_adapter_and_its_base_give_the_trained_model(whole, base):
    stored = load_file(whole / "all" / "checkpoints" / "step-12" / "model.safetensors")
    assert not any("base_layer" in name or "embed_tokens" in name or "lm_head" in name for name in stored)
    trained = spikelm.SpikeLMForCausalLM.from_pretrained(whole / "all" / "model")
    made = spikelm.load_adapter(base, whole / "all" / "adapter", progress=False)
    made = spikelm.adapters.merge_adapter(made).state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in trained.state_dict().items())
    first = spikelm.SpikeLMForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name in first if not torch.equal(first[name], made[name])}
    assert {name.split(".")[-2] for name in changed if name.endswith("_proj.weight")} == {"q_proj", "up_proj"}
    assert not any(name.startswith(("lm_head", "model.embed")) for name in changed)
    assert any(".gla.gate." in name for name in changed)  # what a source does not have is trained whole


WRONG = {
    "unknown": ({"anealing": {}}, "spikes has no 'anealing'; it has annealing, "),
    "field": ({"annealing": {"until": 0.5}}, "spikes.annealing: unknown field until"),
    "missing": ({"silent_share": {}}, "spikes.silent_share: field target is missing"),
    "type": ({"counts": {"stages": ["8"]}}, "spikes.counts: stages must be"),
    "mapping": ({"rate": 0.1}, "spikes.rate must hold named fields"),
    "over": ({"annealing": {"over": 0.0}}, "spikes.annealing: over must be a share"),
    "start": ({"dead_zone": {"start": -1.0}}, "spikes.dead_zone: start must be a factor"),
    "target": ({"silent_share": {"target": 1.0}}, "spikes.silent_share: target must be a silent share"),
    "gain": ({"silent_share": {"target": 0.5, "gain": 0.0}}, "spikes.silent_share: gain must be above 0"),
    "stages": ({"counts": {"stages": [2, 4]}}, "spikes.counts: stages must be positive"),
    "weight": ({"rate": {"weight": 0.0}}, "spikes.rate: weight and width must be above 0"),
    "scale": ({"gradient_noise": {"scale": 0.0}}, "spikes.gradient_noise: scale must be above 0"),
    "both": ({"dead_zone": {}, "silent_share": {"target": 0.5}}, "choose one"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        spike_callbacks(given)
    assert "\n" not in str(caught.value)


def test_a_model_that_they_do_not_fit(tmp_path):
    config = tiny_settings(tmp_path).config
    for name, fields, changes, message in (
        ("annealing", {}, {"spike_sites": None}, "no spike sites to anneal"),
        ("dead_zone", {}, {}, "no dead zones above 0"),
        ("rate", {"weight": 1.0}, {"spike_neuron": "lif", "spike_code": "ternary"}, "no rate to regularise"),
    ):
        settings = tiny_settings(tmp_path / name, config=config | changes, spikes={name: fields})
        with pytest.raises(ValueError, match=message):
            run(settings, data=tiny_data)


def test_the_page_shows_every_kind():
    shown = yaml.safe_load(spikes.__doc__.split("file.")[1].split("Each is")[0])["spikes"]
    assert set(shown) == set(KINDS)
    assert len(spike_callbacks({name: fields for name, fields in shown.items() if name != "silent_share"})) == 5


def test_noise_is_that_of_its_step_and_has_its_size():
    def gradients(seed):
        model = nn.Linear(400, 500)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        add_noise(model, 0.5, seed)
        return [parameter.grad for parameter in model.parameters()]

    first, again, other = gradients(3), gradients(3), gradients(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    assert first[0].std() == pytest.approx(0.5, rel=0.02) and abs(first[0].mean()) < 0.005
    noise = GradientNoise(0.5, decay=1.0)
    assert [noise.sigma(step) for step in (0, 3, 8)] == pytest.approx([0.5, 0.25, 0.5 / 3])
    with pytest.raises(ValueError, match="whole gradients"):
        noise.on_pre_optimizer_step(
            SimpleNamespace(seed=0), SimpleNamespace(global_step=0), None, model=nn.Linear(2, 2)
        )
