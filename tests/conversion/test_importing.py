"""Import and export of published checkpoints: what is refused, what travels, what is left when something fails."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_tokenizer import letters
from spikelm import SpikeLMConfig, presets
from spikelm.conversion import checkpoints
from spikelm.conversion import folder as folder_module
from spikelm.conversion.convert import blank_model, convert
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.conversion.published import KINDS
from spikelm.loading import load_model
from tests.conversion.spikingbrain import published_config, published_tensors, write_published
from tests.conversion.test_sources import Trap
from tests.conversion.tiny import qwen2

PRESETS = {
    "spikingbrain-7b": "spikingbrain-7b",
    "spikingbrain-w8aspike": "spikingbrain-7b-w8aspike",
    "spikegpt": "spikegpt-216m",
    "rwkv4": "spikegpt-216m",  # the same tensors: neurons have none
    "rwkv7": "rwkv7-0.1b",
    "evnn-egru-lm": "egru-ptb",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as published, with all that lies around the weights."""
    folder = write_published(tmp_path_factory.mktemp("published") / "model", published_tensors())
    letters().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 2048}')
    (folder / "LICENSE").write_text("Be kind.")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "modeling_gla_swa.py").write_text("raise SystemExit('executed')")
    return folder


@pytest.fixture(scope="module")
def ours(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "model"
    import_checkpoint("spikingbrain-7b", published, out, progress=False)
    return out


def refused(kind, source, place, config=None, tensors=None, do=import_checkpoint) -> str:
    """The one line with which something is refused; nothing may be left at `out` or beside it."""
    if tensors is not None:
        source = write_published(place / "source", tensors, config)
    before = sorted(place.iterdir())
    with pytest.raises(ValueError) as raised:
        do(kind, source, place / "out", progress=False)
    assert sorted(place.iterdir()) == before
    message = str(raised.value)
    assert "\n" not in message and len(message) < 900
    return message


def rewrite(folder, name, change):
    """Change one tensor of a model folder."""
    tensors = checkpoints.read_checkpoint(folder, False)
    tensors[name] = change(tensors[name])
    (folder / "model.safetensors").unlink()
    checkpoints.write_checkpoint(folder, tensors.items())


@pytest.mark.parametrize("kind", list(KINDS))
def test_key_tables_have_as_many_tensors_and_bytes_as_published(kind):
    model = blank_model(presets.get(PRESETS[kind]))
    ours, table = dict(model.state_dict()), {}
    if model.config.tie_word_embeddings:
        del ours["lm_head.weight"]
    for rule in KINDS[kind].rules(model.config):
        table |= zip(rule.published, rule.write(*(ours[name] for name in rule.ours)), strict=True)
    filled = [name for rule in KINDS[kind].rules(model.config) for name in rule.ours]
    assert len(filled) == len(set(filled))
    assert set(ours) - set(filled) == {name for name in ours if name.endswith(("_site.k", "_site.dead_zone"))}
    count, size = len(table), sum(tensor.nbytes for tensor in table.values())
    assert (count, size) == {
        "spikingbrain-7b": (395, 4 * 7_616_542_976),  # on the meta device in float32
        "spikingbrain-w8aspike": (591, 30_769_980_416),
        "spikegpt": (330, 4 * 215_399_424),
        "rwkv4": (330, 4 * 215_399_424),
        "rwkv7": (399, 4 * 191_034_624),
        # The tied matrix is listed twice, and 3 x 3 numbers of training.
        "evnn-egru-lm": (27, 4 * (31_699_150 + 7_500_000 + 9)),
    }[kind]


@pytest.mark.parametrize("kind", list(KINDS))
def test_rules_undo_each_other(kind):
    config = presets.get(re.sub(r"-[0-9.]+[bm]", "-tiny", PRESETS[kind]))
    blank = blank_model(config).state_dict()
    for rule in KINDS[kind].rules(config):
        ours = [torch.ones(blank[name].shape) for name in rule.ours]
        for before, after in zip(ours, rule.read(*rule.write(*ours)), strict=True):
            assert torch.equal(before, after)


def test_what_lies_around_the_weights_travels_both_ways(published, ours, tmp_path):
    export_checkpoint("spikingbrain-7b", ours, tmp_path / "back", progress=False)
    for place in (ours, tmp_path / "back"):
        assert AutoTokenizer.from_pretrained(ours)("the")["input_ids"] == letters()("the")["input_ids"]
        for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
            assert (place / name).read_bytes() == (published / name).read_bytes()
        assert not list(place.glob("*.py"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["GLAswaForCausalLM"]
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "generation_config.json", "LICENSE",
    }  # fmt: skip


def test_an_imported_folder_is_a_model_folder_like_any_other(ours):
    assert AutoModelForCausalLM.from_pretrained(ours).generation_config.max_new_tokens == 2048
    model, tokenizer = load_model(ours, progress=False)
    assert model.generate(**tokenizer("THE", return_tensors="pt"), max_new_tokens=3).shape[1] == 6
    card = (ours / "README.md").read_text()
    assert "license: mit" in card and "spikelm export spikingbrain-7b" in card and "untrained" not in card


def test_one_file_of_weights_is_a_checkpoint_too(published, ours, tmp_path):
    import_checkpoint("spikingbrain-7b", published / "model.safetensors", tmp_path / "out", progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in ours.iterdir()}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_tensors_of_several_dtypes_are_kept_and_noted(tmp_path):
    tensors = published_tensors(dtype=torch.bfloat16) | {"model.norm.weight": torch.ones(256)}
    source = write_published(tmp_path / "source", tensors)
    record = import_checkpoint("spikingbrain-7b", source, tmp_path / "out", progress=False)
    assert record["result"]["dtype"] == "bfloat16" and "bfloat16, float32" in record["notes"][0]
    assert checkpoints.read_checkpoint(tmp_path / "out", False)["model.norm.weight"].dtype is torch.float32


def test_shards_are_written_as_tensors_come(published, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 400_000)
    import_checkpoint("spikingbrain-7b", published, tmp_path / "out", progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files) and len(files) > 5
    assert max(files.values()) < 410_000 and not list((tmp_path / "out").glob("*.partial"))
    whole, parts = (checkpoints.read_checkpoint(folder, False) for folder in (ours, tmp_path / "out"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.update({"model.ghost": torch.zeros(1)}), "holds 1 tensors that .* does not: model.ghost"),
        (lambda t: t.pop("lm_head.weight"), r"lacks 1 of its 59: lm_head\.weight\. Get the checkpoint as"),
        (lambda t: [t.pop(name) for name in list(t)[:20]], "lacks 20 of its 59: .* and 14 more"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"norm\.weight .* has shape \[3\]; .* \[256\]"),
        (lambda t: t["model.layers.1.attn.k_proj.bias"].fill_(torch.nan), "k_proj.bias .* not finite"),
        (lambda t: t.update({"model.norm.weight": torch.ones(256, dtype=torch.int64)}), "int64; expected float16"),
    ],
)
def test_tensors_that_do_not_fit(damage, said, tmp_path):
    tensors = published_tensors()
    damage(tensors)
    assert re.search(said, refused("spikingbrain-7b", None, tmp_path, tensors=tensors))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, s: s.fill_(0), "scales must be positive and finite"),
        (lambda w, s: s.mul_(1e-4), "its largest code is .* at most 32767"),
    ],
)
def test_scales_that_are_none(change, said, tmp_path):
    tensors, name = published_tensors(w8=True), "model.layers.2.mlp.up_proj.weight"
    change(tensors[name], tensors[f"{name}_quantizer.scales"])
    message = refused("spikingbrain-w8aspike", None, tmp_path, tensors=tensors)
    assert message.startswith(f"Tensor {name} ") and re.search(said, message)


def test_w8aspike_is_float32(tmp_path):
    tensors = published_tensors(w8=True, dtype=torch.bfloat16)
    assert "is bfloat16; a SpikingBrain-7B-W8ASpike checkpoint is float32" in refused(
        "spikingbrain-w8aspike", None, tmp_path, tensors=tensors
    )


@pytest.mark.parametrize("w8", [False, True])
def test_the_other_kind_is_named(w8, tmp_path):
    message = refused(list(KINDS)[not w8], None, tmp_path, tensors=published_tensors(w8=w8))
    assert f"holds the tensors of kind {list(KINDS)[w8]}, not of {list(KINDS)[not w8]}." in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen2"}, "states model_type 'qwen2'; expected 'gla_swa'"),
        ({"use_short_conv": True}, "short convolutions"),
        ({"hidden_act": "gelu"}, "'gelu'; expected 'swish'"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 512}, "has shape"),
    ],
)
def test_configurations_that_do_not_fit(changes, said, tmp_path):
    config = published_config(**changes)
    assert said in refused("spikingbrain-7b", None, tmp_path, config, published_tensors())


def test_pickled_code_is_never_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = published_tensors() | {"model.norm.weight": Trap()}
    source = write_published(tmp_path / "source", tensors, pickled=True)
    assert "Only plain tensors are accepted from pickles" in refused("spikingbrain-7b", source, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_that_is_not_there(published, tmp_path):
    assert "does not exist" in refused("spikingbrain-7b", tmp_path / "nowhere", tmp_path)
    (tmp_path / "bare").mkdir()
    assert "has no weights" in refused("spikingbrain-7b", tmp_path / "bare", tmp_path)
    torch.save(published_tensors(), tmp_path / "bare" / "pytorch_model.bin")
    assert "it has no config.json" in refused("spikingbrain-7b", tmp_path / "bare", tmp_path)
    assert "cannot be read as weights" in refused("spikingbrain-7b", published / "LICENSE", tmp_path)
    assert "'rwkv9' is not known; expected one of: spikingbrain-7b" in refused("rwkv9", tmp_path, tmp_path)


@pytest.mark.parametrize("moment", ["write_checkpoint", "write_record"])
def test_a_failure_while_writing_leaves_nothing(moment, published, tmp_path, monkeypatch):
    whole = getattr(folder_module if moment == "write_record" else checkpoints, moment)

    def half(*args):
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"spikelm.conversion.importing.{moment}", half)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint("spikingbrain-7b", published, tmp_path / "deep" / "out", progress=False)
    assert not list(tmp_path.iterdir())


def test_what_an_import_wrote_may_be_replaced_and_nothing_else(published, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        import_checkpoint("spikingbrain-7b", published, tmp_path / "out", progress=False)
    import_checkpoint("spikingbrain-7b", published, tmp_path / "out", overwrite=True, progress=False)
    with pytest.raises(ValueError, match="never overwritten"):
        import_checkpoint("spikingbrain-7b", published, published, overwrite=True, progress=False)
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint("spikingbrain-7b", ours, tmp_path / "out", progress=False)


def test_a_model_from_elsewhere_is_exported_if_the_format_can_express_it(tmp_path):
    """A Qwen2 with its layers changed, brought into the published form and back: the same logits."""
    plan = {"mixers": ["gla", "swa", "gla", "swa"], "window": 8, "sinks": 0, "sites": "none"}
    model = convert(qwen2(tie_word_embeddings=False), tmp_path / "model", progress=False, **plan)
    message = refused("spikingbrain-7b", tmp_path / "model", tmp_path, do=export_checkpoint)
    assert "differs in attention_window_off_by_one (False, the format has True)" in message
    config = SpikeLMConfig.from_pretrained(tmp_path / "model")
    config.attention_window_off_by_one = True
    config.save_pretrained(tmp_path / "model")
    export_checkpoint("spikingbrain-7b", tmp_path / "model", tmp_path / "published", progress=False)
    import_checkpoint("spikingbrain-7b", tmp_path / "published", tmp_path / "back", progress=False)
    model.config.attention_window_off_by_one = True
    ids = torch.arange(20)[None]
    expected, got = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("model", "back"))
    assert torch.equal(got, expected)


def test_models_that_the_format_cannot_express(published, ours, tmp_path):
    assert "cannot be written as spikingbrain-w8aspike" in refused(
        "spikingbrain-w8aspike", ours, tmp_path, do=export_checkpoint
    )
    assert "states model_type 'gla_swa'" in refused("spikingbrain-7b", published, tmp_path, do=export_checkpoint)
    assert "has no config.json" in refused("spikingbrain-7b", tmp_path, tmp_path, do=export_checkpoint)


def test_sites_that_were_changed_are_not_dropped_in_silence(tmp_path):
    source = write_published(tmp_path / "source", published_tensors(w8=True))
    import_checkpoint("spikingbrain-w8aspike", source, tmp_path / "ours", progress=False)
    rewrite(tmp_path / "ours", "model.layers.1.ffn.gate_up_site.dead_zone", lambda zone: zone + 0.5)
    message = refused("spikingbrain-w8aspike", tmp_path / "ours", tmp_path, do=export_checkpoint)
    assert "holds no tensors of spike sites" in message and "gate_up_site.dead_zone" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight * 1.01, "has values that SpikingBrain-7B-W8ASpike cannot hold"),
        (lambda weight: weight.bfloat16(), "is bfloat16; a SpikingBrain-7B-W8ASpike checkpoint is float32"),
    ],
)
def test_weights_that_left_their_grid_are_not_exported(change, said, tmp_path):
    """As after training, or saved in another dtype: the published forward would not be the model's."""
    source = write_published(tmp_path / "source", published_tensors(w8=True))
    import_checkpoint("spikingbrain-w8aspike", source, tmp_path / "ours", progress=False)
    rewrite(tmp_path / "ours", "model.layers.1.ffn.gate_proj.weight", change)
    message = refused("spikingbrain-w8aspike", tmp_path / "ours", tmp_path, do=export_checkpoint)
    assert said in message and "layers.1.ffn.gate_proj.weight" in message
