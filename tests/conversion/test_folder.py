import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikelm.conversion import folder as folder_module
from spikelm.conversion.convert import convert
from spikelm.conversion.folder import add_measurements
from tests.conversion.tiny import VOCAB, llama


@pytest.fixture(scope="module")
def source():
    return llama()


def listing(place):
    return sorted(path.name for path in place.iterdir())


FAILURES = {"error": OSError("disk full"), "interrupt": KeyboardInterrupt()}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("moment", ["weights", "record", "publish"])
def test_a_failure_while_writing_leaves_nothing(moment, failure, source, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise failure

    if moment == "weights":
        saved = type(convert(source, progress=False)).save_pretrained

        def half(self, place, **kwargs):
            saved(self, place, **kwargs)
            raise failure

        monkeypatch.setattr("spikelm.modeling.SpikeLMForCausalLM.save_pretrained", half)
    else:
        monkeypatch.setattr(folder_module, {"record": "write_record", "publish": "_publish"}[moment], fail)
    with pytest.raises(type(failure)):
        convert(source, tmp_path / "deep" / "out", progress=False)
    assert listing(tmp_path) == []


def test_a_failure_while_replacing_brings_the_old_folder_back(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, sites="none", progress=False)
    replace, failed = folder_module.Path.replace, []

    def failing(self, target):
        if target == out and not failed:
            failed.append(self)
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(folder_module.Path, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, overwrite=True, progress=False)
    monkeypatch.undo()
    assert failed and listing(tmp_path) == ["out"]
    assert json.loads((out / "conversion.json").read_text())["plan"]["sites"] == "none"
    AutoModelForCausalLM.from_pretrained(out)


def test_a_failure_while_calibrating_leaves_nothing(source, tmp_path):
    with pytest.raises(ValueError, match="cannot be reached"):
        ids = torch.arange(2000) % VOCAB
        convert(source, tmp_path / "out", silent_share=0.999, calibration_text=ids, progress=False)
    assert listing(tmp_path) == []


def test_existing_out_is_refused_before_any_work(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, progress=False)
    monkeypatch.setattr("spikelm.conversion.convert.open_source", lambda *a, **k: pytest.fail("worked"))
    with pytest.raises(ValueError, match="exists already"):
        convert(source, out, progress=False)


def test_overwriting_replaces_what_a_conversion_wrote_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, sites="none", progress=False)
    convert(source, out, sites=["down"], overwrite=True, progress=False)
    assert AutoModelForCausalLM.from_pretrained(out).config.spike_sites == ["down"]
    assert listing(tmp_path) == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="never overwritten"):
        convert(source, precious, overwrite=True, progress=False)
    assert listing(precious) == ["thesis.txt"]
    with pytest.raises(ValueError, match="is a file"):
        convert(source, precious / "thesis.txt", overwrite=True, progress=False)


@pytest.mark.skipif(os.getuid() == 0 if hasattr(os, "getuid") else True, reason="root may write everywhere")
def test_place_that_cannot_be_written(source, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not a writable folder"):
        convert(source, tmp_path / "out", progress=False)


def test_parent_that_is_a_file(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a writable folder"):
        convert(source, tmp_path / "file" / "out", progress=False)


def test_record_says_what_was_done(source, tmp_path):
    out = tmp_path / "out"
    ids = torch.arange(2000) % VOCAB
    model = convert(source, out, mixers="uniform:2", silent_share=0.4, calibration_text=ids, progress=False)
    record = json.loads((out / "conversion.json").read_text())
    assert record == json.loads(json.dumps(model.conversion))
    assert record["schema_version"] == 1
    assert record["source"]["family"] == "Llama" and record["source"]["kind"] == "model"
    assert record["plan"]["silent_share"] == 0.4 and record["plan"]["k"] == 4.0
    assert record["result"]["layers"] == ["gla", "attention", "gla", "attention"]
    assert record["keys"] == {"source_tensors": 39, "filled": 39, "new": len(record["new_parameters"])}
    assert "model.layers.0.mixer.gla.gate.1.bias" in record["new_parameters"]
    assert record["calibration"]["silent_share_reads"] == pytest.approx(0.4, abs=0.01)
    assert len(json.dumps(record)) < 20_000, "a record holds no tensors"


def test_measured_numbers_reach_card_and_record(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, progress=False)
    assert "Nothing yet" in (out / "README.md").read_text()
    add_measurements(out, {"perplexity_ratio": 1.0567, "text": "docs"})
    add_measurements(out, {"tokens": 8000})
    card = (out / "README.md").read_text()
    assert "| perplexity_ratio | 1.057 |" in card and "| tokens | 8000 |" in card and "| text | docs |" in card
    assert json.loads((out / "conversion.json").read_text())["measured"]["perplexity_ratio"] == 1.0567
    assert not [name for name in listing(out) if "partial" in name]
    with pytest.raises(ValueError, match="no conversion"):
        add_measurements(tmp_path, {})


def test_card_warns_of_untrained_parameters(source, tmp_path):
    convert(source, tmp_path / "new", mixers=["gla+swa", "delta", "keep", "swa"], progress=False)
    convert(source, tmp_path / "keep", progress=False)
    warning = "Layers with delta, gla have new, untrained parameters"
    assert warning in (tmp_path / "new" / "README.md").read_text()
    assert "untrained" not in (tmp_path / "keep" / "README.md").read_text()


def test_plan_is_shown_before_work(source, capsys):
    convert(source, sites="none")
    assert "Conversion plan" in capsys.readouterr().err
