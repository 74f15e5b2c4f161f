"""Parts that fail, runs that are interrupted, reports side by side."""

import dataclasses
import json

import pytest
import torch

import spikelm
from spikelm.eval import evaluate as module
from spikelm.eval.compare_reports import column_names, compare_reports, read_report
from spikelm.eval.evaluate import assigned, evaluate, failed
from spikelm.eval.parts import Part
from spikelm.eval.store import weights_hash
from spikelm.inference.prepare import set_events


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 4


def part(name, run, **options):
    """A part of ten tokens that shows its one number."""
    return Part(
        name=name,
        title=name.replace("_", " ").capitalize(),
        full=Settings(),
        quick=Settings(2),
        run=run,
        cost=lambda subject, settings: 10,
        page=lambda result: [f"The number is {result['number']}."],
        summary=lambda result: {"number": result["number"]},
        **options,
    )


@pytest.fixture
def parts(monkeypatch):
    """Three parts: one that works, one whose failure can be repaired, one that needs it; and how often each ran."""
    ran, broken = [], {"speed": True}

    def works(subject, settings, bar, earlier):
        ran.append("spikes")
        bar.update(3)
        return {"number": float("nan") if settings.size == 5 else settings.size}

    def fails(subject, settings, bar, earlier):
        ran.append("speed")
        if broken["speed"]:
            raise KeyError("a bug")
        return {"number": 7}

    def needs(subject, settings, bar, earlier):
        ran.append("robustness")
        return {"number": earlier["speed"]["number"] + 1}

    made = [part("spikes", works), part("speed", fails), part("robustness", needs, needs=("speed",))]
    made.append(part("tasks", works, lacks=lambda subject: "nothing to do"))
    monkeypatch.setattr(module, "PARTS", {p.name: p for p in made})
    return ran, broken


@pytest.fixture
def go(make_pair, tokenizer, prose, tmp_path):
    model, baseline = make_pair(torch.float32, num_hidden_layers=1)

    def call(**options):
        options = {"parts": list(module.PARTS), "out": tmp_path / "out", "progress": False} | options
        return evaluate(options.pop("model", model), baseline, tokenizer, [prose], **options)

    call.model = model
    return call


def status(report):
    return {record["name"]: record["status"] for record in report["parts"]}


def test_a_part_that_fails_is_reported_and_the_others_run(parts, go, tmp_path):
    report = go()
    assert status(report) == {"spikes": "finished", "speed": "failed", "robustness": "failed", "tasks": "left out"}
    assert report["spikes"] == {"number": 4} and report["speed"] is report["robustness"] is None
    assert failed(report)[0] == "speed: KeyError: 'a bug'" and "needs" not in failed(report)[0]
    assert "made from the part 'speed'" in failed(report)[1]
    assert report["perplexity"] == {"model": None, "baseline": None} and report["rows"] == []
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    for name in ("report.md", "report.html"):
        page = (tmp_path / "out" / name).read_text()
        assert "The number is 4." in page and "a bug" in page and "nothing to do" in page
    assert "a bug" in json.loads((tmp_path / "out" / "parts" / "speed.json").read_text())["record"]["traceback"]


def test_the_next_run_does_what_is_not_finished(parts, go):
    ran, broken = parts
    go()
    broken["speed"] = False
    report = go()
    assert ran == ["spikes", "speed", "speed", "robustness"]
    assert status(report)["robustness"] == "finished" and report["robustness"] == {"number": 8}
    go()
    assert len(ran) == 4


def test_an_interrupted_run_goes_on(parts, go, tmp_path, monkeypatch):
    ran, broken = parts

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(module.PARTS, "speed", part("speed", interrupted))
        go()
    assert not (tmp_path / "out" / "report.json").exists()
    broken["speed"] = False
    go()
    assert ran == ["spikes", "speed", "robustness"]


def test_whatever_a_number_depends_on_makes_it_new(parts, go, prose, make_pair):
    ran, broken = parts
    broken["speed"] = False
    go()
    for changes in ({"quick": True}, {"settings": {"spikes": {"size": 9}}}, {"calibration": prose}):
        before = len(ran)
        go(**changes)
        assert "spikes" in ran[before:], changes
    other, _ = make_pair(torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        other.model.layers[0].mixer.q_proj.weight[0, 0] += 1e-3
    assert weights_hash(other) != weights_hash(go.model)
    before = len(ran)
    go(model=other)
    assert ran[before:] == ["spikes", "speed", "robustness"]


def test_a_part_made_from_another_or_from_a_file_follows_it(parts, go, tmp_path, monkeypatch):
    _, broken = parts
    broken["speed"] = False
    file = tmp_path / "constants.yaml"
    file.write_text("1")
    made = dataclasses.replace(module.PARTS["robustness"], needs=("spikes",), reads=lambda settings: [file])
    made = dataclasses.replace(made, run=lambda s, setting, bar, earlier: {"number": earlier["spikes"]["number"]})
    monkeypatch.setitem(module.PARTS, "robustness", made)
    assert go()["robustness"] == {"number": 4}
    assert go(settings={"spikes": {"size": 9}})["robustness"] == {"number": 9}
    monkeypatch.setitem(module.PARTS, "robustness", dataclasses.replace(made, run=lambda *_: {"number": 1}))
    assert go(settings={"spikes": {"size": 9}})["robustness"] == {"number": 9}  # kept
    file.write_text("2")
    assert go(settings={"spikes": {"size": 9}})["robustness"] == {"number": 1}


def test_whether_events_are_skipped_makes_it_new(parts, go):
    ran, _ = parts
    spikelm.prepare_for_inference(go.model, "fp32", "always")
    go()
    set_events(go.model, "never")
    before = len(ran)
    go()
    assert "spikes" in ran[before:]


def test_settings_are_read_from_text():
    assert assigned(["quality.tokens=5", "tasks.tasks=[a, b]", "energy.constants=null"]) == {
        "quality": {"tokens": 5},
        "tasks": {"tasks": ("a", "b")},
        "energy": {"constants": None},
    }
    for wrong in ("tokens=5", "quality.tokens", "a.b.c=1"):
        with pytest.raises(ValueError, match="is not of the form"):
            assigned([wrong])


def test_a_damaged_file_is_measured_again(parts, go, tmp_path):
    ran, broken = parts
    broken["speed"] = False
    go()
    (tmp_path / "out" / "parts" / "spikes.json").write_text("{")
    go()
    assert ran.count("spikes") == 2 and ran.count("speed") == 1


def test_numbers_that_json_does_not_know_are_null(parts, go):
    assert go(parts=["spikes"], settings={"spikes": {"size": 5}})["spikes"] == {"number": None}


def test_reports_stand_side_by_side(parts, go, tmp_path):
    _, broken = parts
    one, two = tmp_path / "a" / "x", tmp_path / "b" / "x"
    go(out=one)
    broken["speed"] = False
    go(out=two, settings={"spikes": {"size": 8}}, execute="trains")
    names = column_names([one, two / "report.json"])
    assert names == ["x", "x-2"]
    page = compare_reports(dict(zip(names, map(read_report, (one, two)))), module.PARTS)
    assert "| number | 4 | 8 |" in page and "| number |  | 7 |" in page
    assert "| settings of spikes | size 4 | size 8 |" in page and "| run on | counts | trains |" in page
    assert "- x: failed. KeyError: 'a bug'" in page and "| texts |" not in page
    same = compare_reports({"x": read_report(one), "y": read_report(one)}, module.PARTS)
    assert "Measured on the same data" in same


def test_what_is_no_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no report at"):
        read_report(tmp_path)
    for content, message in (("{", "is not JSON"), ('{"schema_version": 0, "parts": []}', "not a report of schema 1")):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_report(tmp_path)
