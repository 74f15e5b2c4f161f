"""A prepared model computes what the dense model on its grid computes, whatever it is made of."""

import copy

import pytest
import torch
from torch import nn

from small_models import EVERY_SITE, PATTERNS, SITES, small_config, small_model
from spikelm import SpikeLMForCausalLM, SpikeStatistics, execute_trains, prepare_for_inference, restore_dense
from spikelm.cache import CACHE_NAME
from spikelm.grid import on_grid
from spikelm.inference.linears import EventProduct, Reader
from spikelm.inference.prepare import set_events
from spikelm.kernels.weight_rows import LARGEST_CODE

EXACT = 1e-9
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
SOME = ["gla-swa-attention", "gla+swa-apart", "rwkv7+swa-gla-rwkv7", "egru", "rwkv4", "moe", "dsn", "lif", "hgrn"]
SOME += ["gemma-like", "egru-stack", "delta"]


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 11))


@torch.no_grad()
def on_its_grid(model, format):
    """The dense model with every matrix rounded to the grid of a format, in a straight line and float64."""
    dense, done = copy.deepcopy(model), set()
    for name, module in dense.named_modules():
        matrix = isinstance(module, (nn.Linear, nn.Embedding)) and not name.endswith("router")
        if not matrix or id(module.weight) in done:  # tied weights are rounded once
            continue
        weight = module.weight
        done.add(id(weight))
        if format == "bf16":
            weight.copy_(weight.bfloat16())
        elif format in LARGEST_CODE:
            narrow = weight.float()  # no width reaches a second group of 128
            scale = narrow.abs().amax(1, keepdim=True) / LARGEST_CODE[format]
            # A table's weights are rounded to float32; integer products are scaled as a whole.
            wide = torch.float32 if name in ("lm_head", "model.embed_tokens") else torch.float64
            weight.copy_((narrow / scale).round().to(wide) * scale.to(wide))
    return dense


@torch.no_grad()
def token_by_token(model, ids, first=5):
    out = model(ids[:, :first], use_cache=True)
    pieces = [out.logits]
    for token in ids[:, first:].unbind(1):
        out = model(token[:, None], use_cache=True, **{CACHE_NAME: out[CACHE_NAME]})
        pieces.append(out.logits)
    return torch.cat(pieces, 1)


def differ(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("name", SOME)
def test_equals_the_dense_model_on_its_grid(name, format, ids):
    model = small_model(spike_sites=EVERY_SITE, spike_dead_zone=0.4, **PATTERNS[name])
    dense = on_its_grid(model, format)
    prepare_for_inference(model, format, "always")
    with torch.no_grad():
        expected = dense(ids).logits
        assert differ(model(ids).logits, expected) < EXACT
    assert differ(token_by_token(model, ids), expected) < EXACT


@pytest.mark.parametrize("events", ["always", "never"])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("sites", [[], SITES], ids=["float", "spiking"])
def test_every_format_with_and_without_events(format, events, sites, ids):
    model = small_model(spike_sites=sites, tie_word_embeddings=True, attention_bias=True, ffn_bias=True)
    dense = on_its_grid(model, format)
    prepare_for_inference(model, format, events)
    assert differ(token_by_token(model, ids), dense(ids).logits) < EXACT


def test_padding_and_generation(ids):
    model = small_model(spike_sites=SITES, spike_dead_zone=0.4, mixers=["gla", "attention", "gla"])
    dense = on_its_grid(model, "int4")
    prepare_for_inference(model, "int4", "always")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}, {"num_beams": 2}):
        assert torch.equal(model.generate(ids, **OPTIONS, **options), dense.generate(ids, **OPTIONS, **options))


def test_sites_are_counted_and_trains_run_as_before(ids):
    model = small_model(spike_sites=SITES, spike_dead_zone=0.4)
    counted = []
    for network in (copy.deepcopy(model), prepare_for_inference(model, "fp32", "always")):
        with SpikeStatistics(network) as statistics:
            network.generate(ids, **OPTIONS)
        counted.append((statistics.summary(), statistics.by_site()))
    assert counted[0] == counted[1]
    before = model(ids).logits
    with torch.no_grad(), execute_trains(model):
        assert differ(model(ids).logits, before) < EXACT


def test_a_substituted_site_is_read_as_it_is(ids):
    model = small_model(spike_sites=SITES)
    dense = on_its_grid(model, "int8")
    prepare_for_inference(model, "int8", "always")
    for network in (model, dense):
        for module in network.modules():
            if hasattr(module, "substitute"):
                module.substitute = lambda x: x.clamp_min(0.1) - 0.1
    assert differ(model(ids[:1]).logits, dense(ids[:1]).logits) < EXACT


@pytest.mark.parametrize("format, bits", [("fp32", 32), ("bf16", 16), ("int8", 8.25), ("int4", 4.25)])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_is_that_of_the_format(format, bits, tied):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 997, "num_hidden_layers": 2}
    config = small_config(**sizes, tie_word_embeddings=tied, spike_sites=SITES)
    model = SpikeLMForCausalLM(config)
    matrices = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    prepare_for_inference(model, format, "always")
    held = (value for m in model.modules() for value in m.__dict__.values() if isinstance(value, torch.Tensor))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*model.parameters(), *model.buffers(), *held)}  # fmt: skip
    assert sum(storages.values()) <= 1.1 * (bits / 8 * sum(matrices.values()) + 4 * vectors)


def test_restoring_gives_the_weights_back(ids):
    model = small_model(torch.float32, spike_sites=SITES, tie_word_embeddings=True, mixers="gla")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    restore_dense(prepare_for_inference(model, "fp32", "always"))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_codes_of_a_grid_are_kept():
    model = small_model(torch.float32, spike_sites=SITES, weight_group_size=16)
    with torch.no_grad():
        for module in model.modules():
            if (grid := getattr(module, "grid", None)) is not None:
                grid.scales.uniform_(0.005, 0.02)
                module.weight.copy_(on_grid(torch.randint(-127, 128, module.weight.shape), grid.scales))
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("model.layers")}
    restore_dense(prepare_for_inference(model, "int8", "always"))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_one_product_for_all_readers_of_a_site(ids):
    model = prepare_for_inference(small_model(spike_sites=SITES, mixers="gla"), "fp32", "always")
    assert model.model.layers[0].mixer.q_proj.product.widths == [32, 16, 16, 16]  # q, k, v and the gate
    products = [m for m in model.modules() if isinstance(m, EventProduct)]
    calls = []
    for product in products:
        product.register_forward_hook(lambda *_: calls.append(1))
    model(ids[:1, :1])
    assert len(calls) == len(products)
    assert all(p._input is None and p.site.handed_on is None for p in products if p.site is not None)


def test_a_copy_stands_alone(ids):
    model = prepare_for_inference(small_model(torch.float32, spike_sites=SITES), "int8", "always")
    expected = token_by_token(model, ids)
    twin = set_events(copy.deepcopy(model), "never")
    for module in twin.modules():
        if isinstance(module, EventProduct):
            module.data.zero_()
    assert torch.equal(token_by_token(model, ids), expected)
    assert differ(token_by_token(twin, ids), expected) > 0


def test_readers_are_linears_to_whoever_asks():
    model = small_model(torch.float32, spike_sites=SITES, attention_bias=True)
    before = model.model.layers[1].mixer.k_proj
    prepare_for_inference(model, "fp32", "always")
    after = model.model.layers[1].mixer.k_proj
    assert isinstance(after, Reader) and isinstance(after, nn.Linear)
    assert torch.equal(after.weight, before.weight) and torch.equal(after.bias, before.bias)


@pytest.mark.parametrize(
    "options, message",
    [({"weights": "int3"}, "weights must be one of"), ({"events": "often"}, "events must be one of")],
)
def test_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        prepare_for_inference(small_model(), **options)


def test_prepared_once_and_restored_once():
    model = prepare_for_inference(small_model(), "fp32", "never")
    with pytest.raises(ValueError, match="not prepared yet"):
        prepare_for_inference(model)
    with pytest.raises(ValueError, match="must be prepared"):
        restore_dense(restore_dense(model))
