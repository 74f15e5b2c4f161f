"""The recipe at a tiny size: trains, measures, resumes at the next model, reports mistakes in a line."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from spikelm.recipes.byte_models import Recipe, Windows, bits_per_byte, main, run

FIELDS = {
    "heldout": ["b.txt"],
    "tokens": 2048,
    "window": 32,
    "batch": 4,
    "learning_rate": 3e-3,
    "warmup": 0.1,
    "seed": 0,
    "common": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "models": {"plain": {"mixers": "attention"}, "spiking": {"mixers": "gla", "spike_sites": ["o", "down"]}},
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question. " * 40)
    (tmp_path / "b.txt").write_text("whether it is nobler in the mind to suffer the slings and arrows. " * 12)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(FIELDS | {"texts": str(tmp_path / "*.txt")}))
    return path


def test_trains_measures_and_goes_on_where_it_stopped(config, tmp_path):
    out = tmp_path / "out"
    results = run(Recipe.read(config), out)
    assert set(results["models"]) == {"plain", "spiking"}
    for result in results["models"].values():
        assert 0 < result["bits_per_byte"] < 8 and result["curve"][-1][1] < result["curve"][0][1]
    assert results["models"]["plain"]["silent_share"] is None
    assert 0 < results["models"]["spiking"]["silent_share"] < 1
    assert {"table.md", "results.json", "curves.png", "plain", "spiking"} <= {path.name for path in out.iterdir()}
    assert AutoModelForCausalLM.from_pretrained(out / "spiking").config.mixers == ["gla"]

    saved = json.loads((out / "results.json").read_text())
    del saved["models"]["plain"]
    (out / "results.json").write_text(json.dumps(saved))
    again = run(Recipe.read(config), out)
    kept = ("bits_per_byte", "train_seconds", "curve", "silent_share")
    assert all(again["models"]["spiking"][k] == saved["models"]["spiking"][k] for k in kept)  # not trained anew
    assert again["models"]["spiking"]["decode_tokens_per_s"] > 0 and again["machine"]["torch"]
    assert again["models"]["plain"]["bits_per_byte"] == results["models"]["plain"]["bits_per_byte"]  # same training


def test_every_byte_is_predicted_once_from_at_least_half_a_window():
    ids, seen = torch.arange(3, 103), []

    def model(rows):
        seen.append(rows)
        return SimpleNamespace(logits=torch.zeros(*rows.shape, 259))

    assert bits_per_byte(model, ids, 20) == pytest.approx(math.log2(259))
    rows = torch.cat(seen)
    scored = torch.cat([rows[0, 1:], rows[1:, 10:].flatten()])
    assert torch.equal(scored, ids[1:])


def test_windows_are_the_same_for_every_model():
    ids = torch.arange(1000)
    first, second = Windows(ids, 16, 8, seed=1), Windows(ids, 16, 8, seed=1)
    assert all(torch.equal(first[i]["input_ids"], second[i]["input_ids"]) for i in range(8))
    assert not torch.equal(first[0]["input_ids"], Windows(ids, 16, 8, seed=2)[0]["input_ids"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": None}, "must give exactly"),
        ({"texts": "nowhere/*.txt"}, "no file matches"),
        ({"heldout": ["c.txt"]}, "held-out files are missing"),
        ({"models": {"wrong": {"mixers": "mamba"}}}, "mamba"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(changes, said, config, tmp_path, capsys):
    fields = yaml.safe_load(config.read_text()) | changes
    config.write_text(yaml.safe_dump({name: value for name, value in fields.items() if value is not None}))
    with pytest.raises(SystemExit) as stopped:
        main.main([str(config), "--out", str(tmp_path / "out")], standalone_mode=False)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("spikelm: error: ") and said in last
