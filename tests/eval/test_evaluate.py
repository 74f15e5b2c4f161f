import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch

from report_keys import documented_keys, written_keys
from small_models import SITES, small_model
from spikelm.eval import report as report_module
from spikelm.eval.data import Text, tokenize
from spikelm.eval.evaluate import PARTS, evaluate
from spikelm.eval.fidelity import combine
from spikelm.eval.files import write_whole
from spikelm.eval.quality import SPIKES
from spikelm.eval.report import write_report
from spikelm.eval.rows import curve_windows
from spikelm.spiking import spike_groups

QUALITY = {"tokens": 60, "window": 24, "curve_tokens": 40}
SMALL = {"settings": {"quality": QUALITY}, "progress": False}
BARE = SMALL | {"settings": {"quality": QUALITY | {"controls": False, "curve": False}}}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, make_tokenizer, make_pair):
    """A report on two texts, its folder, and the model."""
    torch.manual_seed(0)
    model, baseline = make_pair(torch.float32, num_hidden_layers=2)
    texts = [
        Text("one", "It fires; then it waits (a while). " * 10, "here"),
        Text("two", "A neuron is silent. " * 30, "there"),
    ]
    out = tmp_path_factory.mktemp("report")
    losses = {"0": {"before": 0.5, "after": 0.25}, "1": {"before": 0.75, "after": 0.5}}
    learned = {"text": "some text", "text_sha256": "0", "tokens": 96, "window": 24, "held_out_tokens": 48}
    model.conversion = {"transfer": learned | {"layers": losses}}
    calibration = Text("calibration", "It has something to say. " * 10, "elsewhere")
    report = evaluate(model, baseline, make_tokenizer(), texts, calibration=calibration, out=out, **SMALL)
    return report, out, model


def test_the_documented_keys_are_the_written_keys(evaluated):
    _, out, _ = evaluated
    written = written_keys(json.loads((out / "report.json").read_text()))
    documented = documented_keys()
    # A part that was not asked for is null; its keys are tested with it.
    parts = {key: re.split(r"[.\[]", key)[0] for key in documented}
    documented = {parts[key] if parts[key] in PARTS else key for key in documented}
    # A text repeats the headline, the spikes and the rows.
    per_text = (*combine([]), *SPIKES, "rows[]")
    repeated = {f"texts[].{key}" for key in documented if key.split(".")[0] in per_text}
    assert written == documented | repeated


def test_the_report_shows_what_the_conversion_learned(evaluated):
    report, out, _ = evaluated
    assert report["transfer"]["layers"] == [
        {"layer": 0, "before": 0.5, "after": 0.25},
        {"layer": 1, "before": 0.75, "after": 0.5},
    ]
    text = (out / "report.md").read_text()
    assert "| 1 | 0.7500 | 0.5000 |" in text and "on 96 tokens of some text" in text


def test_the_report_holds_the_rows_the_curve_and_the_sites(evaluated):
    report, _, model = evaluated
    assert [row["name"] for row in report["rows"]] == [
        "baseline", "model", "uniform_dead_zone", "teal", "int_k", "plain_k3",
    ]  # fmt: skip
    baseline, own, uniform, teal, integers, plain = report["rows"]
    assert baseline["perplexity_ratio"] == 1 and baseline["silent_share_reads"] is None
    assert own["perplexity_ratio"] == report["perplexity_ratio"] != 1
    assert own["silent_share_reads"] == report["silent_share_reads"] > 0.2
    assert uniform["silent_share_reads"] == pytest.approx(own["silent_share_reads"], abs=0.01)
    assert teal["silent_share_reads"] == pytest.approx(own["silent_share_reads"], abs=0.02)
    assert plain["k"] == 3 and plain["silent_share_reads"] < own["silent_share_reads"]
    assert 2 <= integers["bits_mean"] <= integers["bits_max"]
    families = [point["family"] for point in report["curve"]]
    assert {"calibrated", "uniform_dead_zone", "teal", "model", "int_k", "plain_k3"} == set(families)
    for point in report["curve"]:
        assert point["tokens"] == 48
        if point["target_silent_share"] is not None:
            assert point["silent_share_reads"] == pytest.approx(point["target_silent_share"], abs=0.08)
    assert [site["path"] for site in report["sites"]] == [group.path for group in spike_groups(model)]
    assert {site["tokens"] for site in report["sites"]} == {120}


def test_the_headline_is_the_token_weighted_mean_of_the_texts(evaluated):
    report, _, _ = evaluated
    one, two = report["texts"]
    for key in ("silent_share_reads", "kl_nats", "top1_agreement"):
        assert report[key] == pytest.approx((one[key] + two[key]) / 2)  # as many tokens each
    mean = (one["nll_nats"]["model"] + two["nll_nats"]["model"]) / 2
    assert report["nll_nats"]["model"] == pytest.approx(mean)


def test_what_was_measured_is_written_down(evaluated):
    report, out, _ = evaluated
    on = report["measured_on"]
    assert [text["name"] for text in on["texts"]] == ["one", "two"]
    assert on["texts"][0] | {"bytes": 0} == {
        "name": "one", "source": "here", "tokens": 60, "predicted_tokens": 57, "bytes": 0, "window": 24, "stride": 24,
    }  # fmt: skip
    assert on["calibration"] == {"name": "calibration", "source": "elsewhere", "tokens": 240}
    assert on["versions"]["torch"] == torch.__version__ and on["threads"] == torch.get_num_threads()
    assert (on["code"], on["k"], on["execute"]) == ("bitwise", [3.0], "counts")
    assert all(rate > 0 for speeds in report["tokens_per_second"].values() for rate in speeds.values())
    assert len(report["load_average"]) == 3
    text = (out / "report.md").read_text()
    for needed in ("TEAL", "uniform dead zone", "int-k", "glossary.md", "raster.png", "sites.png", "curve.png"):
        assert needed in text
    assert "nan" not in text and "None" not in text


def test_pictures_are_written_and_nothing_global_changes(evaluated):
    _, out, _ = evaluated
    for name in ("raster.png", "sites.png", "curve.png"):
        content = (out / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
        assert matplotlib.image.imread(out / name).std() > 0.05  # not an empty canvas
    pages = {"report.json", "report.md", "report.html", "glossary.md", "parts"}
    assert {path.name for path in out.iterdir()} == pages | {"raster.png", "sites.png", "curve.png"}


def test_evaluation_leaves_the_models_as_they_were(make_pair, tokenizer, prose):
    model, baseline = make_pair(num_hidden_layers=1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, baseline, tokenizer, [prose], calibration=prose, **SMALL)
    assert model.training and not baseline.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not g.site.observers and g.site.substitute is None for g in spike_groups(model))
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in baseline.parameters())


def test_a_model_without_sites_has_no_spike_fields(make_pair, tokenizer, prose, tmp_path):
    _, baseline = make_pair(num_hidden_layers=1)
    report = evaluate(baseline, baseline, tokenizer, [prose], out=tmp_path, **SMALL)
    assert all(report[key] is None for key in SPIKES)
    assert report["perplexity_ratio"] == 1 and report["sites"] == [] and report["curve"] == []
    assert [row["name"] for row in report["rows"]] == ["baseline", "model"]
    assert report["measured_on"]["code"] is None and report["measured_on"]["calibration"]["tokens"] == 0
    assert not list(tmp_path.glob("*.png"))
    assert "no spike sites" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("mixers", [["gla", "attention"], "gla+swa"])
def test_recurrent_mixers_are_evaluated(tokenizer, prose, mixers):
    model = small_model(torch.float32, num_hidden_layers=2, mixers=mixers, spike_sites=SITES)
    baseline = small_model(torch.float32, num_hidden_layers=2)
    report = evaluate(model, baseline, tokenizer, [prose], **BARE)
    assert report["dense_macs_per_token"]["linear_attention"] > 0
    assert 0 < report["silent_share"] < 1


def test_trains_give_the_quality_of_counts(make_pair, tokenizer, prose):
    model, baseline = make_pair(num_hidden_layers=1)
    counts, trains = (
        evaluate(model, baseline, tokenizer, [prose], execute=execute, **BARE) for execute in ("counts", "trains")
    )
    assert trains["measured_on"]["execute"] == "trains"
    for key in ("perplexity_ratio", "kl_nats", "silent_share_reads", "firing_rate"):
        assert trains[key] == pytest.approx(counts[key], rel=1e-9)


def test_wrong_arguments_are_refused(make_pair, tokenizer, prose, tmp_path):
    model, baseline = make_pair(num_hidden_layers=1)
    (tmp_path / "file").write_text("")
    cases = {
        "no text": {"texts": []},
        "Several texts are called 'prose'": {"texts": [prose, prose]},
        "execute must be one of counts, trains": {"execute": "spikes"},
        "too short: 3000 tokens found, 6000 needed": {"settings": {"quality": {"tokens": 6000}}},
        "is a file; give a folder": {"out": tmp_path / "file"},
        "no part 'taste'; choose among quality": {"parts": ["taste"]},
        "No part was asked for": {"parts": []},
        "quality has no setting 'token'; it has tokens, window": {"settings": {"quality": {"token": 5}}},
    }
    for message, changes in cases.items():
        arguments = SMALL | {"texts": [prose]} | changes
        with pytest.raises(ValueError, match=message):
            evaluate(model, baseline, tokenizer, arguments.pop("texts"), **arguments)
    small, _ = make_pair(num_hidden_layers=1, vocab_size=60)
    with pytest.raises(ValueError, match=r"gives token \d+, but SpikeLMForCausalLM knows 60"):
        evaluate(small, small, tokenizer, [prose], **SMALL)
    with pytest.raises(ValueError, match="no spike sites"):
        evaluate(baseline, baseline, tokenizer, [prose], execute="trains", **SMALL)


def test_neurons_are_measured_without_controls(make_pair, tokenizer, prose, tmp_path):
    neurons, baseline = make_pair(torch.float32, num_hidden_layers=1, spike_neuron="lif", spike_code="binary")
    report = evaluate(neurons, baseline, tokenizer, [prose], out=tmp_path, **SMALL)
    assert [row["name"] for row in report["rows"]] == ["baseline", "model"] and report["curve"] == []
    assert "qkv_site holds LIFSite" in report["controls_left_out"] and report["silent_share"] > 0
    assert report["controls_left_out"] in (tmp_path / "report.md").read_text()


def test_without_a_baseline_the_model_stands_alone(make_pair, tokenizer, prose, tmp_path):
    model, baseline = make_pair(torch.float32, num_hidden_layers=1)
    alone = evaluate(model, None, tokenizer, [prose], out=tmp_path, **BARE)
    paired = evaluate(model, baseline, tokenizer, [prose], **BARE)
    assert alone["bits_per_byte"]["model"] == pytest.approx(paired["bits_per_byte"]["model"], rel=1e-6)
    assert alone["bits_per_byte"]["baseline"] is None
    assert alone["kl_nats"] is None and [row["name"] for row in alone["rows"]] == ["model"]
    assert alone["measured_on"]["baseline"] is None and "bits per byte" in (tmp_path / "report.md").read_text()


def test_curve_windows_are_taken_in_turn_from_every_text(tokenizer, letters, prose):
    texts = [tokenize(letters, tokenizer, 80, 16), tokenize(prose, tokenizer, 16, 16)]
    assert curve_windows(texts, 40) == [2, 1]
    assert curve_windows(texts, 16) == [1, 0]
    assert curve_windows(texts, 10_000) == [5, 1]


def test_a_report_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fails(self, content):
        with open(self, "wb") as file:
            file.write(content[:1])
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(Path, "write_bytes", fails)
        write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_text() == "new"


def test_numbers_that_json_does_not_know_never_reach_a_file(tmp_path):
    assert report_module.finite({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report({"perplexity_ratio": float("nan")}, {}, tmp_path)
    assert not list(tmp_path.iterdir())
