"""The command line from end to end on a tiny model, and its errors: one line, exit code 2, nothing left behind."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from small_tokenizer import letters
from spikelm.cli import main
from spikelm.eval.evaluate import PARTS
from tests.conversion import spikegpt
from tests.conversion.spikingbrain import published_tensors, write_published

PROSE = "the quick brown fox jumps over the lazy dog while seven grey mice watch the moon rise slowly. "


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tiny Llama and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = letters()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "prose.txt"
    file.write_text(PROSE * 60)
    return file


@pytest.fixture(scope="module")
def converted(source, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "spiking"
    command = ["convert", source, out, "--k", "4", "--silent-share", "0.3", "--calibration-text", text]
    assert call(*command) == 0
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny SpikingBrain-7B in its published layout."""
    return write_published(tmp_path_factory.mktemp("published") / "spikingbrain", published_tensors())


@pytest.fixture(scope="module")
def pth(tmp_path_factory):
    """A tiny SpikeGPT as published: one file."""
    file = tmp_path_factory.mktemp("spikegpt") / "SpikeGPT.pth"
    torch.save(spikegpt.published_tensors(), file)
    return file


def call(*arguments):
    return main([str(argument) for argument in arguments])


def test_convert_writes_a_model_that_loads(converted):
    record = json.loads((converted / "conversion.json").read_text())
    assert record["plan"]["k"] == 4 and record["source"]["family"]
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.config.sites_at(1) == ("qkv", "o", "gate_up", "down")
    assert model.model.layers[0].ffn.down_site.dead_zone.max() > 0


def test_import_and_export_go_there_and_back(published, tmp_path, capsys):
    assert call("import", "spikingbrain-7b", published, tmp_path / "ours") == 0
    assert "no tokenizer" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.mixers == ["gla", "swa"] * 2
    assert call("export", "spikingbrain-7b", tmp_path / "ours", tmp_path / "back") == 0
    assert sorted(load_file(tmp_path / "back" / "model.safetensors")) == sorted(published_tensors())
    assert call("import", "spikingbrain-7b", tmp_path / "back", tmp_path / "ours", "--overwrite") == 0


def test_one_pth_file_goes_there_and_back(pth, tmp_path, capsys):
    assert call("import", "spikegpt", pth, tmp_path / "ours", "--no-binary-embedding") == 0
    assert "binary_embedding is False" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.binary_embedding is False
    assert call("export", "spikegpt", tmp_path / "ours", tmp_path / "back") == 0
    assert set(torch.load(tmp_path / "back" / "spikegpt.pth")) == set(spikegpt.published_tensors())
    assert call("import", "rwkv4", tmp_path / "back", tmp_path / "ours", "--overwrite") == 0
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.is_spiking


@pytest.mark.parametrize("execute", ["counts", "trains"])
def test_generate_streams_text_and_says_how_silent_it_was(converted, execute, capsys):
    assert call("generate", converted, "--prompt", "the quick", "--max-new-tokens", 6, "--execute", execute) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "6 tokens" in err and "weight reads" in err


def test_generate_with_weights_laid_out_for_inference(converted, capsys):
    for options in (["--weights", "int8", "--events", "always"], ["--weights", "fp32", "--events", "never"]):
        assert call("generate", converted, "--prompt", "the quick", "--max-new-tokens", 6, *options) == 0
        assert "of weight reads behind spike sites unnecessary" in capsys.readouterr().err


def test_generate_runs_a_plain_source_too(source, capsys):
    assert call("generate", source, "--prompt", "the quick", "--max-new-tokens", 4, "--raw") == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_eval_writes_a_report(converted, source, text, tmp_path, capsys):
    options = ["--tokens", 512, "--window", 128, "--curve-tokens", 128, "--calibration-text", text]
    options += ["--parts", "quality"]
    assert call("eval", converted, "--baseline", source, "--text", text, "--out", tmp_path / "report", *options) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["perplexity_ratio"] > 0 and 0.2 < report["silent_share_reads"] < 0.4
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {"", ".json", ".md", ".html", ".png"}
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and 'id="glossary"' in page and "http" not in page
    capsys.readouterr()
    assert call("compare", tmp_path / "report", tmp_path / "report", "--out", tmp_path / "compared") == 0
    printed = capsys.readouterr().out
    assert "| perplexity ratio |" in printed and (tmp_path / "compared" / "compare.md").read_text() in printed


def test_eval_says_by_its_exit_code_that_a_part_failed(converted, source, text, tmp_path, capsys, monkeypatch):
    def breaks(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(PARTS, "quality", dataclasses.replace(PARTS["quality"], run=breaks))
    command = ["eval", converted, "--baseline", source, "--text", text, "--out", tmp_path, "--tokens", 256]
    assert call(*command, "--parts", "quality", "--set", "quality.window=128") == 1
    assert "spikelm: failed: quality: RuntimeError: out of luck" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["parts"][0]["settings"]["window"] == 128


def test_eval_on_trains_agrees_with_counts(converted, source, text, tmp_path):
    options = ["--tokens", 256, "--window", 128, "--curve-tokens", 0, "--no-controls", "--dtype", "float64"]
    options += ["--parts", "quality"]
    reports = []
    for execute in ("counts", "trains"):
        out = tmp_path / execute
        command = ["eval", converted, "--baseline", source, "--text", text, "--out", out, "--execute", execute]
        assert call(*command, *options) == 0
        reports.append(json.loads((out / "report.json").read_text()))
    for key in ("perplexity_ratio", "kl_nats", "silent_share", "silent_share_reads"):
        assert reports[0][key] == pytest.approx(reports[1][key], abs=1e-9)


def test_quickstart_does_the_whole_job_twice(source, tmp_path, capsys):
    out = tmp_path / "quickstart"
    for _ in range(2):
        assert call("quickstart", "--model", source, "--out", out, "--tokens", 1024, "--curve-tokens", 512) == 0
        files = {path.name for path in out.iterdir()}
        assert {"conversion.json", "report.json", "report.md", "model.safetensors", "tokenizer.json"} <= files
        assert len([name for name in files if name.endswith(".png")]) >= 3
    assert json.loads((out / "conversion.json").read_text())["measured"]["perplexity_ratio"] > 0
    assert "perplexity ratio" in capsys.readouterr().err


def test_bench_kernels_prints_a_table_and_writes_json(tmp_path, capsys):
    sizes = ["--length", 32, "--batch", 1, "--heads", 1, "--width", 8, "--repeats", 2]
    assert call("bench", "kernels", "--op", "scan", *sizes, "--out", tmp_path / "kernels.json") == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward", "forward_backward", "step"}
    assert "scan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "nowhere", "OUT"], "does not exist"),
        (["convert", "SOURCE", "OUT", "--mixers", "mamba"], "mamba"),
        (["convert", "SOURCE", "OUT", "--mixers", "gla,gla,gla"], "the source has 2"),
        (["convert", "SOURCE", "OUT", "--spikes", "qkv,v"], "qkv, o, gate_up, down"),
        (["convert", "SOURCE", "OUT", "--code", "binary"], "binary"),
        (["convert", "SOURCE", "OUT", "--silent-share", "1.5"], "between 0 and 1"),
        (["convert", "SOURCE", "OUT", "--calibration-text", "nowhere.txt"], "no such file"),
        (["convert", "SOURCE", "SOURCE"], "exists already"),
        (["generate", "nowhere", "--prompt", "x"], "does not exist"),
        (["generate", "CONVERTED", "--prompt", ""], "prompt is empty"),
        (["generate", "SOURCE", "--prompt", "the", "--execute", "trains"], "no spike sites"),
        (["generate", "SOURCE", "--prompt", "the", "--weights", "int8"], "are for spikelm models"),
        (["generate", "CONVERTED", "--prompt", "the", "--events", "always"], "Choose a format of its weights"),
        (["bench", "decode"], "either a model folder or --shape"),
        (["eval", "CONVERTED", "--baseline", "SOURCE", "--text", "nowhere.txt", "--out", "OUT"], "no such file"),
        (["eval", "CONVERTED", "--baseline", "nowhere", "--text", "TEXT", "--out", "OUT"], "does not exist"),
        (["eval", "CONVERTED", "--text", "TEXT", "--out", "OUT", "--parts", "taste"], "no part 'taste'"),
        (["eval", "CONVERTED", "--text", "TEXT", "--out", "OUT", "--set", "tokens=5"], "PART.NAME=VALUE"),
        (["eval", "CONVERTED", "--text", "TEXT", "--out", "OUT", "--set", "quality.tokens=["], "no YAML value"),
        (["eval", "CONVERTED", "--text", "TEXT", "--out", "OUT", "--set", "quality.taste=1"], "no setting 'taste'"),
        (["compare", "OUT"], "no report at"),
        (["quickstart", "--model", "nowhere", "--out", "OUT"], "does not exist"),
        (["quickstart", "--out", "SOURCE"], "never overwritten"),
        (["frobnicate"], "No such command"),
        (["bench", "kernels", "--op", "softmax"], "softmax"),
        (["convert", "SOURCE"], "OUT"),
        (["import", "spikingbrain-8b", "PUBLISHED", "OUT"], "spikingbrain-w8aspike"),
        (["import", "spikingbrain-7b", "nowhere", "OUT"], "does not exist"),
        (["import", "spikingbrain-7b", "SOURCE", "OUT"], "model_type 'llama'"),
        (["import", "spikingbrain-w8aspike", "PUBLISHED", "OUT"], "tensors of kind spikingbrain-7b"),
        (["import", "spikingbrain-7b", "PUBLISHED", "SOURCE"], "exists already"),
        (["import", "spikegpt", "PUBLISHED", "OUT"], "it lacks emb.weight"),
        (["import", "spikingbrain-7b", "PTH", "OUT"], "it has no config.json"),
        (["import", "rwkv4", "PTH", "OUT", "--binary-embedding"], "no choice of binary_embedding"),
        (["import", "spikegpt", "TEXT", "OUT"], "cannot be read as weights"),
        (["export", "spikegpt", "CONVERTED", "OUT"], "cannot be written as spikegpt; it lacks"),
        (["export", "spikingbrain-7b", "PUBLISHED", "OUT"], "model_type 'gla_swa'"),
        (["export", "spikingbrain-7b", "CONVERTED", "OUT"], "it differs in"),
        (["export", "spikingbrain-7b", "CONVERTED"], "OUT"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    arguments, said, source, converted, published, pth, text, tmp_path, capsys
):
    places = {"SOURCE": source, "CONVERTED": converted, "TEXT": text, "OUT": tmp_path / "out"}
    places |= {"PUBLISHED": published, "PTH": pth}
    before = sorted(tmp_path.iterdir())
    assert call(*[places.get(argument, argument) for argument in arguments]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("spikelm: error: ") and said in last
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_model_is_one_line(converted, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in converted.iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content[:-100] if path.suffix == ".safetensors" else content)
    assert call("generate", damaged, "--prompt", "the") == 2
    assert "damaged or truncated" in capsys.readouterr().err


def test_the_installed_command_exits_with_two():
    done = subprocess.run(
        [sys.executable, "-m", "spikelm.cli", "generate", "nowhere", "--prompt", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
