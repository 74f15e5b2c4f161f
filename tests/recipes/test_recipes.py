"""Recipes as commands: text files in, a model folder and a report out; mistakes are one line and exit code 2."""

import json
import os

import pytest
import yaml
from transformers import AutoModelForCausalLM

from spikelm.cli import RECIPES, main
from spikelm.recipes import extend_context, pretrain

TEXT = "to be or not to be, that is the question. whether it is nobler in the mind to suffer the slings. "


@pytest.fixture
def folder(tmp_path, cache):
    (tmp_path / "corpus").mkdir()
    for name, begin in (("a", 0), ("b", 20), ("c", 40)):
        (tmp_path / "corpus" / f"{name}.txt").write_text(TEXT[begin:] * 4)
    return tmp_path


def settings(folder, **changes):
    fields = {
        "out": str(folder / "out"),
        "tokenizer": "bytes",
        "config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mixers": ["gla", "swa"],
            "attention_window": 8,
            "max_position_embeddings": 32,
            "spike_sites": ["o", "down"],
        },
        "data": {"sources": [{"files": str(folder / "corpus" / "*.txt")}], "window": 32, "heldout": ["c.txt"]},
        "tokens": 4 * 64,
        "batch": 2,
        "micro_batch": 1,
        "checkpoints": 2 * 64,
        "training": {"use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "logging_steps": 1},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (fields | changes).items() if v is not None}))
    return path


def test_pretrain_then_longer_windows_in_stages(folder, capsys):
    assert main(["train", "pretrain", str(settings(folder))]) == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["steps"] == 4 and len(report["losses"]) == 4 and len(report["heldout_losses"]) == 2
    assert report["data"]["sources"][0]["heldout_files"] == 1
    assert main(["train", "pretrain", str(settings(folder))]) == 0
    assert "is finished" in capsys.readouterr().err

    rope = {"rope_type": "default", "rope_theta": 5e4}
    changes = [
        {"data": {"window": 64}, "batch": 1, "config": {"max_position_embeddings": 64}},
        {
            "data": {"window": 128},
            "batch": 1,
            "tokens": 512,
            "config": {"rope_parameters": rope, "attention_window": 16},
        },
    ]
    shared = {"model": str(folder / "out" / "model"), "out": str(folder / "long"), "tokenizer": None, "config": None}
    path = settings(folder, **shared, stages=changes)
    last = extend_context.train(path)
    assert last["steps"] == 4 and last["settings"]["model"] == str(folder / "long" / "stage-1" / "model")
    config = AutoModelForCausalLM.from_pretrained(folder / "long" / "model").config
    assert (config.max_position_embeddings, config.attention_window) == (64, 16)
    assert config.rope_parameters["rope_theta"] == 5e4
    first = json.loads((folder / "long" / "stage-1" / "report.json").read_text())
    assert first["losses"][0]["loss"] < report["losses"][0]["loss"]

    capsys.readouterr()
    assert main(["train", "extend_context", str(path)]) == 0
    assert capsys.readouterr().err.count("is finished") == 2
    later = [changes[0], changes[1] | {"config": {"attention_window": -1}}]
    assert main(["train", "extend_context", str(settings(folder, **shared | {"out": "x"}, stages=later))]) == 2
    assert "attention_window" in capsys.readouterr().err and not os.path.exists("x")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": 10}, "less than one step"),
        ({"bach": 2}, "recipe.yaml: unknown field bach"),
        ({"model": "nowhere", "tokenizer": None, "config": None}, "nowhere does not exist"),
        ({"tokenizer": "nowhere"}, "nowhere"),
        ({"config": {"hidden_size": 15}}, "hidden size (15) is not a multiple"),
        ({"training": {"learning_rat": 1}}, "training.learning_rat is no field"),
        ({"data": {"window": 32, "sources": [{"files": "nowhere/*.txt"}]}}, "nowhere/*.txt"),
        ({"data": {"window": 32, "sorces": []}}, "sorces"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(folder, changes, said, capsys):
    assert main(["train", "pretrain", str(settings(folder, **changes))]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("spikelm: error: ") and said in last
    assert not (folder / "out").exists()


def test_an_unreadable_file_is_named(folder, capsys):
    (folder / "corpus" / "b.txt").write_bytes(b"caf\xe9")
    assert main(["train", "pretrain", str(settings(folder))]) == 2
    assert "b.txt: not UTF-8 at byte 3" in capsys.readouterr().err


def test_alone_a_recipe_says_its_mistakes_itself(folder, capsys):
    with pytest.raises(SystemExit) as end:
        pretrain.main([str(folder / "nowhere.yaml")])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"spikelm: error: {folder / 'nowhere.yaml'} does not exist; expected a YAML file of settings.\n"
    )


def test_recipes_are_listed(capsys):
    assert main(["train"]) == 2
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["train", "frobnicate", "x.yaml"]) == 2
