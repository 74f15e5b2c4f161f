"""Packed folders: what a prepared model saves is what loads back, and what does not fit is told."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from small_models import PATTERNS, SITES, small_model
from spikelm import SpikeLMForCausalLM, prepare_for_inference, restore_dense


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 9))


@pytest.mark.parametrize(
    "name, format",
    [("gla-swa-attention", "fp32"), ("rwkv7", "int4"), ("moe", "bf16"), ("egru-stack", "int8"), ("dsn", "int8")],
)
def test_what_is_saved_loads_back(name, format, ids, tmp_path):
    tied = name != "egru-stack"
    model = small_model(
        torch.float32, spike_sites=SITES, tie_word_embeddings=tied, attention_bias=True, **PATTERNS[name]
    )
    model.generation_config.max_new_tokens = 7
    prepare_for_inference(model, format, "always").save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, events="never")
    assert again.prepared.weights == format and again.prepared.events == "never" and not again.training
    assert again.generation_config.max_new_tokens == 7
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if key.endswith("proj.weight")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_keep_their_dtype(dtype, ids, tmp_path):
    model = prepare_for_inference(small_model(dtype, spike_sites=SITES), "int8", "always")
    model.save_pretrained(tmp_path)
    again = SpikeLMForCausalLM.from_pretrained(tmp_path, events="always")
    assert torch.equal(again(ids).logits, model(ids).logits) and again(ids).logits.dtype == dtype
    assert again.model.layers[0].mixer.q_proj.product.scales.dtype == torch.float32
    other = SpikeLMForCausalLM.from_pretrained(tmp_path, events="always", dtype=torch.float32)
    assert other(ids).logits.dtype == torch.float32


def test_restored_models_save_the_layout_that_trains(ids, tmp_path):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=SITES), "int8", "always")
    model.save_pretrained(tmp_path / "packed")
    again = SpikeLMForCausalLM.from_pretrained(tmp_path / "packed", events="always")
    restore_dense(again).save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()).get("packed_weights") is None
    dense = SpikeLMForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.prepared is None
    assert torch.equal(dense.model.layers[0].mixer.k_proj.weight, model.model.layers[0].mixer.k_proj.weight)


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.layers.0.mixer.o_proj.product.data"), "lacks model.layers.0.mixer.o_proj.product"),
        (lambda t: t.pop("model.layers.0.mixer.o_proj.product.scales"), "is not int8"),
        (lambda t: t.pop("model.norm.weight"), "lacks tensors: model.norm.weight"),
        (lambda t: t.update(stranger=torch.zeros(1)), "holds unknown tensors: stranger"),
        (
            lambda t: t.update({"model.layers.0.mixer.o_proj.product.data": torch.zeros(8, 32, dtype=torch.int8)}),
            "has 8 rows; its configuration asks for 32",
        ),
    ],
)
def test_what_does_not_fit(change, message, tmp_path):
    prepare_for_inference(small_model(torch.float32, spike_sites=SITES), "int8", "always").save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        SpikeLMForCausalLM.from_pretrained(tmp_path)
