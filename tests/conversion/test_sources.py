import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from spikelm.conversion.convert import convert
from spikelm.conversion.sources import open_source
from tests.conversion.tiny import VOCAB, gemma2, llama, qwen2


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "source"
    llama().save_pretrained(place)
    return place


@pytest.fixture
def sharded(tmp_path):
    place = tmp_path / "sharded"
    llama().save_pretrained(place, max_shard_size="40KB")
    return place


def refusal(source, **kwargs) -> str:
    """The one line with which a source is refused; nothing may be left at OUT or beside it."""
    with pytest.raises(ValueError) as raised:
        convert(source, progress=False, **kwargs)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    return message


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="w0",
        eos_token="w2",
        chat_template="{% for m in messages %}w5 {% endfor %}",
    )


@pytest.mark.parametrize("shards", [False, True])
def test_folder_is_the_identity(shards, folder, sharded):
    place = sharded if shards else folder
    ids = torch.arange(3, 30)[None]
    expected = AutoModelForCausalLM.from_pretrained(place)(ids).logits
    got = convert(place, sites="none", progress=False)(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_bare_decoder_with_tied_embeddings(tmp_path):
    source = llama(tie_word_embeddings=True)
    source.model.save_pretrained(tmp_path)
    ids = torch.arange(3, 30)[None]
    got = convert(tmp_path, sites="none", progress=False)(ids).logits
    torch.testing.assert_close(got, source(ids).logits, atol=1e-5, rtol=0)


def test_pickle_of_plain_tensors_is_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    ids = torch.arange(3, 30)[None]
    got = convert(folder, sites="none", progress=False)(ids).logits
    torch.testing.assert_close(got, llama()(ids).logits, atol=1e-5, rtol=0)


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_pickles_are_never_executed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    assert "cannot be read as weights" in refusal(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_source_is_kept(dtype, tmp_path):
    llama().to(dtype).save_pretrained(tmp_path)
    model = convert(tmp_path, silent_share=0.4, calibration_text=torch.arange(640) % VOCAB, progress=False)
    assert model.lm_head.weight.dtype is dtype
    assert model.model.layers[0].mixer.qkv_site.dead_zone.dtype is torch.float32
    assert convert(tmp_path, dtype="float64", sites="none", progress=False).dtype is torch.float64


def test_loaded_model_is_copied():
    source = llama()
    model = convert(source, sites="none", progress=False)
    before = source.model.norm.weight.clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(source.model.norm.weight, before)


def test_tokenizer_template_generation_and_licence_travel(folder, tmp_path):
    words().save_pretrained(folder)
    (folder / "LICENSE.md").write_text("Be kind.")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    edit(folder / "generation_config.json", temperature=0.6, top_p=0.9, eos_token_id=[2, 7])
    out = tmp_path / "out"
    convert(folder, out, progress=False)
    assert {path.name for path in out.iterdir()} >= {
        "config.json", "model.safetensors", "generation_config.json", "conversion.json", "README.md", "LICENSE.md",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "w5 "
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 7]
    assert (out / "LICENSE.md").read_text() == "Be kind."
    assert "license: mit" in (out / "README.md").read_text()


def test_source_without_tokenizer_is_noted(folder):
    model = convert(folder, progress=False)
    assert any("no tokenizer" in note for note in model.conversion["notes"])


def test_broken_tokenizer_is_noted(folder):
    (folder / "tokenizer.json").write_text("{")
    model = convert(folder, progress=False)
    assert any("could not be loaded" in note for note in model.conversion["notes"])


def test_missing_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "does not exist" in refusal("nowhere")
    assert "does not exist" in refusal(tmp_path / "no.gguf")


def test_file_in_place_of_a_folder(folder):
    assert "is a file" in refusal(folder / "config.json")


def test_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = refusal("someone/something")
    assert "offline" in message and "Check the name" in message


def test_hub_snapshot_is_read_as_a_folder(folder, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(folder)
    )
    opened = open_source("someone/tiny", progress=False)
    assert opened.kind == "hub" and opened.name == "someone/tiny"
    assert [name for name, _ in asked] == ["someone/tiny"]
    assert not any("py" in pattern or "bin" in pattern for _, kw in asked for pattern in kw["allow_patterns"])


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "merge it" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\ufeff\x00"])
def test_config_that_is_no_object(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_config_with_a_wrong_type(folder):
    edit(folder / "config.json", hidden_size="wide")
    assert "not a Llama configuration" in refusal(folder)


def test_config_with_an_unknown_activation(folder):
    edit(folder / "config.json", hidden_act="mystery")
    assert "does not make a model" in refusal(folder) and "mystery" in refusal(folder)


def test_plan_is_checked_before_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "lists 1 layers" in refusal(folder, mixers=["gla"])


def test_unsupported_architectures_are_told_what_is_supported(folder, tmp_path):
    edit(folder / "config.json", model_type="gpt2")
    message = refusal(folder)
    assert "'gpt2'" in message and "Qwen3" in message and "Phi-3" in message
    source = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert "'gpt2'" in refusal(source)
    edit(folder / "config.json", model_type=None)
    assert "not supported" in refusal(folder)


def test_remote_code_is_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "evil.py").write_text("open('executed', 'w')")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    assert "not supported" in refusal(folder)
    edit(folder / "config.json", model_type="llama")
    convert(folder, progress=False)
    assert not (tmp_path / "executed").exists()


def test_spiking_source(folder, tmp_path):
    model = convert(folder, tmp_path / "spiking", progress=False)
    assert "spikelm model already" in refusal(tmp_path / "spiking")
    assert "spikelm model already" in refusal(model)


def test_quantised_source(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised (gptq)" in refusal(folder)


def test_bidirectional_source():
    assert "both directions" in refusal(gemma2(use_bidirectional_attention=True))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, 0.99])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    assert "damaged or truncated" in refusal(folder)


def test_corrupt_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert "damaged or truncated" in refusal(folder)


def test_values_that_are_not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_integer_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert "is int8" in refusal(folder)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)


def test_index_that_promises_more(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert "model.layers.9.weight" in refusal(sharded)


def test_shard_outside_the_folder_is_not_opened(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"].values()))
    shutil.move(sharded / name, tmp_path / name)
    content["weight_map"] = {k: f"../{v}" if v == name else v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert "lacks 1" in refusal(sharded)


def test_missing_tensor_is_refused_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "model.layers.2.self_attn.k_proj.weight" in refusal(folder)


def test_more_layers_in_the_configuration_than_in_the_weights(folder):
    edit(folder / "config.json", num_hidden_layers=5)
    assert "lacks 9" in refusal(folder)


def test_weights_of_another_width(folder):
    edit(folder / "config.json", intermediate_size=64)
    assert "has shape [48, 80]; its configuration expects [48, 64]" in refusal(folder)


def test_what_is_no_source():
    assert "got int" in refusal(7)
    with torch.device("meta"):
        empty = llama()
    assert "meta device" in refusal(empty)


def test_biases_are_accounted_for(folder, tmp_path):
    qwen2().save_pretrained(tmp_path / "qwen")
    edit(tmp_path / "qwen" / "config.json", model_type="llama")
    assert "bias" in refusal(tmp_path / "qwen")
