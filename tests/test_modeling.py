"""The model classes: save and load, missing tensors, meta device, compile, checkpointing, heads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from small_models import EVERY_SITE, PATTERNS, SITES, small_config, small_model
from spikelm import SpikeLMForCausalLM, SpikeLMForSequenceClassification, SpikeLMModel
from spikelm.precision import KeepsDtype


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 9))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_equals_loaded(pattern, sites, ids, tied, dtype, tmp_path):
    model = small_model(dtype=dtype, spike_sites=sites, tie_word_embeddings=tied, **pattern)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before, after = state(model), state(loaded)
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name], after[name]), name
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied


@torch.no_grad()
def test_sharded_with_a_device_map(ids, tmp_path):
    model = small_model(dtype=torch.float32, spike_sites=SITES, mixers=["gla", "swa", "attention"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["gla-swa-attention", "gla+swa-apart", "gemma-like"])
def test_each_missing_tensor_gets_its_initial_value_and_disturbs_no_other(name, tmp_path):
    """Delete one tensor of a checkpoint after the other: only that one changes, to a sane value."""
    model = small_model(dtype=torch.float32, spike_sites=SITES, **PATTERNS[name])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    declared = {"k": 3.0, "dead_zone": 0.0, "norm.weight": 0.0 if name == "gemma-like" else 1.0}
    for missing in tensors:
        if not missing.startswith("model.layers.0."):
            continue
        save_file({k: v for k, v in tensors.items() if k != missing}, file, metadata={"format": "pt"})
        loaded = state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
        for key, value in tensors.items():
            assert key == missing or torch.equal(loaded[key], value), (missing, key)
        assert loaded[missing].isfinite().all() and loaded[missing].abs().max() <= 3.0
        for suffix, value in declared.items():
            if missing.endswith("." + suffix) and "branch_norms" not in missing:
                assert (loaded[missing] == value).all(), missing


def test_a_plain_checkpoint_gains_spike_sites(tmp_path, ids):
    """A float checkpoint loaded with sites in its configuration: the sites start as declared."""
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = small_config(spike_sites=SITES, spike_k=2.5, spike_dead_zone=0.3, spike_threshold="learned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    site = model.model.layers[1].ffn.down_site
    assert (site.k.item(), site.magnitude.item()) == (2.5, 1.0)
    assert site.dead_zone.item() == pytest.approx(0.3)
    assert site.magnitude.requires_grad and not site.k.requires_grad


def test_building_on_meta_equals_building_eagerly(pattern, tmp_path):
    model = small_model(dtype=torch.float32, spike_sites=SITES, **pattern)
    model.save_pretrained(tmp_path)
    loaded = SpikeLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, mine), (_, other) in zip(model.named_buffers(), loaded.named_buffers()):
        assert torch.equal(mine, other), name
    with torch.device("meta"):
        assert all(p.is_meta for p in SpikeLMForCausalLM(model.config).parameters())


def test_spike_tensors_stay_float32_in_a_bfloat16_model(tmp_path):
    model = small_model(dtype=torch.float32, spike_sites=SITES)
    site = model.model.layers[0].mixer.qkv_site
    third = torch.tensor([1 / 3], dtype=torch.float32)
    site.k.copy_(third)
    assert torch.equal(model.to(torch.bfloat16).model.layers[0].mixer.qkv_site.k, third)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.layers[0].mixer.qkv_site.k, third)
    assert loaded.model.layers[0].mixer.q_proj.weight.dtype == torch.bfloat16


def kept_tensors(model):
    """What is to keep its dtype, by name."""
    return {
        f"{path}.{name}": tensor.detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, KeepsDtype)
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }


def test_tensors_that_keep_their_dtype_do_so_however_a_model_becomes_half(pattern, tmp_path):
    model = small_model(dtype=torch.float32, spike_sites=EVERY_SITE, **pattern)
    expected = kept_tensors(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half, dtype in ((loaded, torch.bfloat16), (model.to(torch.float16), torch.float16)):
        kept = kept_tensors(half)
        assert set(kept) == set(expected)
        for name, tensor in expected.items():
            assert kept[name].dtype is torch.float32 and torch.equal(kept[name], tensor), name
        assert all(p.dtype is dtype for name, p in half.named_parameters() if name not in kept)


@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32(pattern, ids):
    model = small_model(dtype=torch.float32, **pattern)
    exact = model(ids).logits
    rounded = model.to(torch.bfloat16)(ids).logits.float()
    # The median over tokens: a head that reads almost nothing is normed up, rounding and all, so one token may be far.
    assert ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).median() < 0.1


def test_trains_under_autocast_near_float32(pattern, sites, ids):
    model = small_model(dtype=torch.float32, spike_sites=sites, **pattern).train()
    torch.manual_seed(0)
    exact = model(ids, labels=ids).loss.item()
    torch.manual_seed(0)  # the same zoneout
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    # Spikes flip where activations are rounded, and each flip moves the loss of so small a model.
    assert loss.item() == pytest.approx(exact, abs=0.5 if sites else 0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_activation_checkpointing_gives_the_same_gradients(pattern, sites, ids):
    model = small_model(spike_sites=sites, **pattern).train()

    def gradients():
        torch.manual_seed(0)  # the same zoneout both times; within one, recomputation must draw it again
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, plain = gradients()
    model.gradient_checkpointing_enable()
    again, checkpointed = gradients()
    assert again == pytest.approx(loss, abs=1e-12)
    for name, gradient in plain.items():
        assert gradient.isfinite().all() and torch.allclose(gradient, checkpointed[name], atol=1e-10), name


def test_every_weight_learns_through_the_spikes(pattern, ids):
    model = small_model(spike_sites=SITES, spike_threshold="learned", **pattern).train()
    model(ids, labels=ids).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


@pytest.mark.parametrize("name", ["gla-swa-attention", "gla+swa", "window_linear", "delta"])
@torch.no_grad()
def test_compiled_without_graph_breaks(name, ids):
    model = small_model(dtype=torch.float32, spike_sites=SITES, use_cache=False, **PATTERNS[name])
    eager = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    assert (compiled - eager).abs().max() < 1e-4


def test_loss_is_token_mean_and_logits_can_be_limited(ids):
    model = small_model()
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_may_have_a_bias_that_starts_at_zero(tied, ids):
    model = SpikeLMForCausalLM(small_config(head_bias=True, tie_word_embeddings=tied)).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.lm_head.bias.any() and SpikeLMForCausalLM(small_config()).lm_head.bias is None
    before = model(ids).logits
    bias = torch.randn(97)
    model.lm_head.bias.data.copy_(bias)
    assert torch.allclose(model(ids).logits - before, bias.expand(2, 9, -1), atol=1e-5)


def test_hidden_states_and_attentions_are_recorded(ids):
    model = small_model(mixers=["gla", "swa", "attention"])
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 2
    assert torch.allclose(out.attentions[1].sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))


def test_heads_that_transformers_gives(ids, tmp_path):
    config = small_config(spike_sites=SITES, pad_token_id=0, num_labels=3)
    model = SpikeLMForSequenceClassification(config).eval()
    assert model(ids).logits.shape == (2, 3)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForSequenceClassification.from_pretrained(tmp_path), SpikeLMForSequenceClassification)
    assert isinstance(AutoModel.from_pretrained(tmp_path), SpikeLMModel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "restarting position_ids or cu_seqlens"),
        ({"attention_mask": torch.ones(2, 4)}, "must cover the 2 x 9 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "expected a batch of 1 with 9 tokens"),
    ],
)
def test_wrong_inputs_are_refused_with_a_reason(ids, arguments, message):
    given = {"input_ids": ids} if arguments else {}
    with pytest.raises(ValueError, match=message):
        small_model()(**given, **arguments)


def test_a_pass_without_tokens_is_refused(ids):
    with pytest.raises(ValueError, match="no token in a batch of 2 x 0"):
        small_model()(ids[:2, :0])
