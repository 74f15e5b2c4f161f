import pytest
import torch

from spikelm.conversion.convert import convert
from spikelm.conversion.families import FAMILIES
from spikelm.conversion.plan import ConversionPlan
from spikelm.conversion.transfer import windows
from tests.conversion.tiny import VOCAB, gemma2, gemma3, llama, mistral

BAD = [
    ({"mixers": "rwkv9"}, "mixers must be one of"),
    ({"mixers": "attention+swa"}, "mixers must be one of"),
    ({"mixers": "gla+delta"}, "mixers must be one of"),
    ({"mixers": "window_linear+attention"}, "mixers must be one of"),
    ({"mixers": "uniform:1"}, "at least 2"),
    ({"mixers": "uniform:x"}, "at least 2"),
    ({"mixers": ["keep", "uniform:2"]}, "mixers must be one of"),
    ({"mixers": "uniform:2", "target": "keep"}, "target must be one of"),
    ({"window": 0, "mixers": "swa"}, "window"),
    ({"window": 2.5, "mixers": "swa"}, "window"),
    ({"sinks": -1}, "sinks"),
    ({"sites": ["qkv", "head"]}, "sites must be .* got head"),
    ({"code": "binary"}, "no negative spikes"),
    ({"code": "morse"}, "code must be one of"),
    ({"k": 0}, "k must be"),
    ({"k": "3"}, "k must be"),
    ({"dead_zone": -0.1}, "dead_zone must be"),
    ({"threshold": "row"}, "threshold must be one of"),
    ({"silent_share": 1.0}, "between 0 and 1"),
    ({"silent_share": 0.3, "dead_zone": 0.2}, "not both"),
    ({"silent_share": 0.3, "sites": "none"}, "needs spike sites"),
    ({"allocation": "random"}, "allocation must be one of"),
    ({"mixer": "gla"}, "Unknown choice mixer"),
    ({"mixers": "auto", "keep": 0}, "keep must be"),
    ({"mixers": "auto", "keep": 1.5}, "keep must be"),
    ({"mixers": "auto", "keep": "half"}, "keep must be"),
]


@pytest.mark.parametrize("choices, message", BAD, ids=[str(choices) for choices, _ in BAD])
def test_unfit_plan_is_one_line(choices, message):
    with pytest.raises(ValueError, match=message) as raised:
        ConversionPlan.of(**choices)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "choices, message",
    [({"mixers": ["gla", "keep"]}, "lists 2 layers, but the source has 4"), ({"window": 8}, "no layer a window")],
)
def test_plan_that_does_not_fit_the_source(choices, message):
    with pytest.raises(ValueError, match=message):
        ConversionPlan.of(**choices).apply(_fields(llama()))


def test_uniform_keeps_every_nth_layer():
    config = ConversionPlan(mixers="uniform:2", target="gla+swa", window=8).apply(_fields(llama()))
    assert config.mixers == ["gla+swa", "attention", "gla+swa", "attention"]
    assert config.attention_window == [8, None, 8, None]
    assert config.attention_sinks == [4, 0, 4, 0]


def test_windows_of_the_source_stay_unless_the_plan_gives_a_width():
    fields = _fields(mistral(sliding_window=5))
    kept = ConversionPlan(mixers=["keep", "gla", "swa", "attention"]).apply(fields)
    assert kept.mixers == ["swa", "gla", "swa", "attention"]
    assert kept.attention_window == [5, None, 5, None]
    assert kept.attention_sinks == 0
    wider = ConversionPlan(mixers=["keep", "gla", "swa", "attention"], window=9).apply(fields)
    assert wider.attention_window == [5, None, 9, None]
    assert wider.attention_sinks == [0, 0, 4, 0]


def test_default_window_is_no_longer_than_the_model_can_read():
    assert ConversionPlan(mixers="swa").apply(_fields(llama())).attention_window == [64] * 4


def test_windowed_linear_layers_have_short_windows_and_no_sinks():
    fields = _fields(llama(max_position_embeddings=512))
    config = ConversionPlan(mixers=["window_linear", "keep", "swa", "delta"]).apply(fields)
    assert config.attention_window == [64, None, 512, None]
    assert config.attention_sinks == [0, 0, 4, 0]
    assert ConversionPlan(mixers="window_linear", window=9).apply(fields).attention_window == [9] * 4


def test_a_cap_on_scores_cannot_become_windowed_linear():
    with pytest.raises(ValueError, match="scores without a cap"):
        ConversionPlan(mixers="window_linear").apply(_fields(gemma2(attn_logit_softcapping=4.0)))


@torch.no_grad()
def test_windowed_linear_attention_is_the_source_until_the_window_is_full():
    source = llama()
    model = convert(source, mixers="window_linear", window=12, sites="none", progress=False)
    ids = torch.randint(3, VOCAB, (2, 20))
    expected, got = source(ids).logits, model(ids).logits
    torch.testing.assert_close(got[:, :12], expected[:, :12], atol=1e-4, rtol=0)
    assert (got[:, 12:] - expected[:, 12:]).abs().amax(-1).min() > 1e-3


def test_k_is_finer_where_dead_zones_silence():
    assert ConversionPlan().k == 3.0
    assert ConversionPlan(silent_share=0.3).k == 4.0
    assert ConversionPlan(silent_share=0.3, k=5.0).k == 5.0


def test_description_names_what_happens():
    plan = ConversionPlan(mixers="uniform:2", target="swa", window=8, silent_share=0.3, sites=["down", "qkv"])
    text = plan.describe(plan.apply(_fields(llama())), "tiny (Llama)")
    for part in ("tiny (Llama)", "2 x swa", "2 x attention", "8 tokens", "qkv, down", "k = 4", "0.3 of the reads"):
        assert part in text
    assert len(text.splitlines()) <= 8


@pytest.mark.parametrize("make", [llama, gemma3])
@pytest.mark.parametrize(
    "mixers",
    [
        "gla",
        "swa",
        "attention",
        "gla+swa",
        "uniform:2",
        ["gla", "keep", "retention+swa", "swa"],
        ["window_linear", "delta"] * 2,
    ],
)
def test_plans_build_run_save_load(mixers, make, tmp_path):
    from transformers import AutoModelForCausalLM

    swa = "swa" in str(mixers)
    out = tmp_path / "model"
    model = convert(make(), out, mixers=mixers, window=6 if swa and make is llama else None, progress=False)
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert expected.isfinite().all()
        assert torch.equal(loaded(ids).logits, expected)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), loaded.generate(ids, **options))


def test_gla_layers_keep_projections_and_start_alike():
    source = llama(attention_bias=True)
    first, second = (convert(source, mixers="gla", sites="none", progress=False) for _ in range(2))
    mixer, attention = first.model.layers[1].mixer, source.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert torch.equal(getattr(mixer, name).weight, getattr(attention, name).weight)
        assert torch.equal(getattr(mixer, name).bias, getattr(attention, name).bias)
    assert torch.equal(mixer.gla.norm.weight, torch.ones(12))
    assert torch.equal(mixer.gla.gate[0].weight, second.model.layers[1].mixer.gla.gate[0].weight)
    assert mixer.gla.gate[0].weight.std() > 0


def one_layer_matters(index: int):
    """A source whose attention adds something in one layer only."""
    source = llama(max_position_embeddings=128)
    for i, layer in enumerate(source.model.layers):
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight) if i != index else layer.self_attn.o_proj.weight.data.mul_(
            4
        )
    return source


@pytest.mark.parametrize("index", [1, 3])
def test_auto_keeps_the_layer_that_matters(index, monkeypatch):
    monkeypatch.setattr("spikelm.conversion.search.TOKENS", 256)
    ids = torch.randint(3, VOCAB, (1024,), generator=torch.Generator().manual_seed(1))
    plan = {"mixers": "auto", "target": "gla", "keep": 1, "transfer_text": ids, "sites": "none", "progress": False}
    source = one_layer_matters(index)
    model = convert(source, **plan)
    expected = ["attention" if i == index else "gla" for i in range(4)]
    assert model.config.mixers == model.conversion["result"]["layers"] == expected
    found = model.conversion["search"]
    assert found["ranking"][0]["layer"] == index and found["auto"]["kept"] == [index]
    assert sorted(entry["layer"] for entry in found["ranking"]) == [0, 1, 2, 3]
    costs = [entry["kl"] for entry in found["ranking"]]
    assert costs == sorted(costs, reverse=True) and costs[0] > 10 * costs[1]
    assert len(found["random"]["kept"]) == 1 and found["random"]["kept"] != [index]
    assert found["auto"]["kl"] < found["random"]["kl"]
    assert (found["tokens"], found["held_out_tokens"], found["seed"]) == (256, 256, 0)
    attention = source.model.layers[index].self_attn
    assert torch.equal(model.model.layers[index].mixer.q_proj.weight, attention.q_proj.weight)
    assert convert(source, **plan).conversion["search"] == found


@torch.no_grad()
def test_the_measured_cost_is_that_of_the_model_with_those_mixers(monkeypatch):
    """Without a transfer afterwards the written model is the plan that was measured, on the same tokens."""
    monkeypatch.setattr("spikelm.conversion.search.TOKENS", 128)
    ids = torch.randint(3, VOCAB, (1024,), generator=torch.Generator().manual_seed(1))
    source = llama(max_position_embeddings=128)
    choices = {"target": "gla+swa", "window": 6, "sites": "none", "progress": False, "dtype": "float64"}
    with torch.enable_grad():
        model = convert(source, mixers="auto", keep=0.5, transfer_text=ids, **choices)
    found = model.conversion["search"]
    _, held = windows(ids, 128)
    own = convert(source, sites="none", progress=False, dtype="float64")
    costs = []
    for row in held:
        mine, theirs = model(row[None]).logits.log_softmax(-1)[0], own(row[None]).logits.log_softmax(-1)[0]
        costs.append(float((theirs.exp() * (theirs - mine)).sum(-1).mean()))
    assert len(found["auto"]["kept"]) == 2
    assert found["auto"]["kl"] == pytest.approx(sum(costs) / len(costs), rel=1e-6)


def test_auto_goes_on_with_what_its_candidates_learned(monkeypatch):
    monkeypatch.setattr("spikelm.conversion.search.TOKENS", 1024)
    ids = torch.randint(3, VOCAB, (1024,), generator=torch.Generator().manual_seed(1))
    choices = {"transfer_text": ids, "transfer_tokens": 64, "progress": False}
    auto = convert(llama(), mixers="auto", keep=2, **choices)
    fresh = convert(llama(), mixers=["keep" if m == "attention" else m for m in auto.config.mixers], **choices)
    for layer, losses in auto.conversion["transfer"]["layers"].items():
        assert losses["before"] < fresh.conversion["transfer"]["layers"][layer]["before"]
    assert len(auto.conversion["transfer"]["layers"]) == 2


def test_auto_needs_layers_to_replace():
    with pytest.raises(ValueError, match="only 4 layers would change"):
        convert(llama(), mixers="auto", keep=4, progress=False)


def _fields(model):
    return FAMILIES[model.config.model_type].fields(model.config)
