"""The conversion table on a tiny model: its rows, their controls, what is made once, what stands in the files."""

import json
import random

import pytest
import torch
import yaml

from small_tokenizer import letters
from spikelm.eval.conversion_table import Builder, Table, as_markdown, main
from tests.conversion.tiny import llama

TABLE = {
    "texts": {"verse": "b/held.txt"},
    "tokens": 96,
    "window": 48,
    "late": 30,
    "dtype": "float32",
    "train": {"a/*.txt": 2, "b/*.txt": 1},
    "calibration_tokens": 512,
    "k": 6,
    "silence": [{"share": 0.3, "distill": 96}],
    "linear": {
        "layers": [1],
        "mixers": {"linear": "gla+swa", "window": "swa"},
        "window": 8,
        "sinks": 2,
        "transfer": 96,
        "distill": 96,
    },
    "distill": {
        "silence": {"window": 24, "batch": 2, "micro_batch": 2},
        "linear": {"window": 48, "batch": 1, "micro_batch": 1},
        "training": {"use_cpu": True, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A source, texts, and an output folder with the rows of a whole table."""
    place = tmp_path_factory.mktemp("table")
    torch.manual_seed(0)
    source = llama(vocab_size=len(letters()))
    source.save_pretrained(place / "source")
    letters().save_pretrained(place / "source")
    rng = random.Random(0)
    for folder in ("a", "b"):
        (place / folder).mkdir()
        for name in ("one", "two", "held"):
            words = [rng.choice(["tree", "lamp", "river", "of", "and"]) for _ in range(60)]
            (place / folder / f"{name}.txt").write_text(" ".join(words))
    builder = Builder(Table(**TABLE), place / "source", place, place / "out")
    for name in builder.table.steps():
        builder.make(name)
    return place, builder


def entries(place, name):
    return json.loads((place / "out" / "rows" / f"{name}.json").read_text())["entries"]


def test_rows_and_their_controls(place):
    place, builder = place
    assert [*builder.table.steps()] == [
        *("calibrated-0.3", "distilled-0.3"),
        *("linear-transferred", "linear-distilled", "window-transferred", "window-distilled"),
    ]
    rows = {entry["name"]: entry for entry in entries(place, "calibrated-0.3")}
    assert [*rows] == ["calibrated", "uniform_dead_zone", "uniform_k4", "teal", "int_k"]
    for name in ("uniform_dead_zone", "uniform_k4", "teal"):
        assert rows[name]["silent_share_reads"] == pytest.approx(rows["calibrated"]["silent_share_reads"], abs=0.03)
    trained = entries(place, "distilled-0.3")[0]
    assert trained["perplexity_ratio"] != rows["calibrated"]["perplexity_ratio"]
    assert trained["silent_share_reads"] == pytest.approx(0.3, abs=0.06)


def test_numbers_are_those_of_the_definition(place):
    place, builder = place
    model, text = builder._silent(0.3), builder.texts[0]
    nll = {"model": [], "source": []}
    with torch.no_grad():
        for window in text.windows:
            for name, network in (("model", model), ("source", builder.baseline)):
                logits = network(window[None]).logits[0, :-1]
                nll[name].append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    difference = torch.stack(nll["model"]) - torch.stack(nll["source"])
    row = entries(place, "calibrated-0.3")[0]
    assert row["loss"] == pytest.approx(difference.mean().exp().item() - 1, abs=1e-5)
    assert row["late"]["loss"] == pytest.approx(difference[:, 30:].mean().exp().item() - 1, abs=1e-5)


def test_what_is_there_is_not_made_again(place, monkeypatch):
    place, builder = place
    monkeypatch.setattr(Builder, "_calibrated", lambda *_: pytest.fail("made again"))
    builder.make("calibrated-0.3")


def test_nothing_held_out_is_trained_on(place):
    place, builder = place
    report = json.loads((place / "out" / "training" / "linear-distilled" / "report.json").read_text())
    held = [name for source in report["data"]["sources"] for name in source.get("heldout_names", [])]
    assert len(held) == 1 and held[0].endswith("held.txt")
    ids = builder._training_ids(100_000)
    text = builder.tokenizer.decode(ids)
    assert (place / "b" / "held.txt").read_text() not in text
    assert (place / "a" / "held.txt").read_text() in text  # of another folder: no text of the table


def test_the_table_shows_every_row(place):
    place, builder = place
    rows = {file.stem: json.loads(file.read_text()) for file in (place / "out" / "rows").glob("*.json")}
    table = as_markdown(builder.table, rows)
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + 6 + 4  # heads, spiking rows, linear rows
    assert f"{rows['calibrated-0.3']['entries'][0]['loss']:.3f}" in table


def test_a_field_that_is_missing_is_named(tmp_path):
    (tmp_path / "table.yaml").write_text("texts: {}\n")
    with pytest.raises(ValueError, match="must give exactly"):
        Table.read(tmp_path / "table.yaml")


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(TABLE))
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "table.yaml"), "--out", str(tmp_path / "out"), "--row", "no-such"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "spikelm: error: There is no row 'no-such'; there are calibrated-0.3, distilled-0.3, linear-transferred, "
        "linear-distilled, window-transferred, window-distilled.\n"
    )
    assert not (tmp_path / "out").exists()
