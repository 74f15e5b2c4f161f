"""One text, many ways to run it: at once, token by token, in chunks, padded, packed. Tier 1: float64, to 1e-9."""

import pytest
import torch

from small_models import PATTERNS, SITES, small_model
from spikelm import SpikeLMForCausalLM
from spikelm.cache import CACHE_NAME
from spikelm.spiking import execute_trains

EXACT = 1e-9
LENGTH = 23


@pytest.fixture
def model(pattern, sites):
    return small_model(spike_sites=sites, **pattern)


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, LENGTH))


def in_chunks(model, ids, cuts, **per_token):
    """Logits of consecutive pieces of `ids` that share a cache; `per_token` tensors `[B, T]` are cut alike."""
    cache, pieces = None, []
    for begin, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        extra = {name: value[:, begin:end] for name, value in per_token.items()}
        out = model(ids[:, begin:end], cache=cache, use_cache=True, **extra)
        cache, pieces = out[CACHE_NAME], [*pieces, out.logits]
    return torch.cat(pieces, 1)


def differ(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def test_token_by_token_equals_one_pass(model, ids):
    assert differ(in_chunks(model, ids, range(1, LENGTH)), model(ids).logits) < EXACT


@torch.no_grad()
def test_chunks_across_window_edges_equal_one_pass(model, ids):
    assert differ(in_chunks(model, ids, [5, 6, 17]), model(ids).logits) < EXACT


@torch.no_grad()
def test_left_padding_changes_nothing(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    padded = model(ids, attention_mask=mask).logits
    assert differ(padded[0, 4:], model(ids[:1, 4:]).logits[0]) < EXACT
    assert differ(padded[1], model(ids[1:]).logits[0]) < EXACT


@torch.no_grad()
def test_right_padding_changes_nothing_and_updates_no_state(model, ids):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:] = 0
    first = model(ids[:, :12], attention_mask=mask, use_cache=True)
    assert differ(first.logits[0, :5], model(ids[:1, :5]).logits[0]) < EXACT
    mask = torch.cat([mask, torch.ones(2, LENGTH - 12, dtype=torch.long)], 1)
    second = model(ids[:, 12:], attention_mask=mask, cache=first[CACHE_NAME])
    whole = model(torch.cat([ids[:1, :5], ids[:1, 12:]], 1)).logits
    assert differ(second.logits[0], whole[0, 5:]) < EXACT
    assert differ(second.logits[1], model(ids[1:]).logits[0, 12:]) < EXACT


DOCUMENTS = [7, 1, 15]


def packed_positions():
    return torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(2, -1)


def one_by_one(model, ids):
    return torch.cat([model(document).logits for document in ids.split(DOCUMENTS, dim=1)], 1)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, ids):
    packed = model(ids, position_ids=packed_positions()).logits
    assert differ(packed, one_by_one(model, ids)) < EXACT


@torch.no_grad()
def test_cu_seqlens_packs_like_restarting_positions(model, ids):
    packed = model(ids[:1], cu_seqlens=torch.tensor([0, 7, 8, 23])).logits
    assert differ(packed, one_by_one(model, ids[:1])) < EXACT


@torch.no_grad()
def test_documents_may_begin_and_end_inside_chunks(model, ids):
    chunked = in_chunks(model, ids, [5, 7, 8, 17], position_ids=packed_positions())
    assert differ(chunked, one_by_one(model, ids)) < EXACT


@torch.no_grad()
def test_packed_and_padded_at_once(model, ids):
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    positions = torch.cat([torch.zeros(3, dtype=torch.long), torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    packed = model(ids, attention_mask=mask, position_ids=positions).logits
    apart = torch.cat([model(ids[:, 3:11]).logits, model(ids[:, 11:]).logits], 1)
    assert differ(packed[:, 3:], apart) < EXACT


@pytest.mark.parametrize("code", ["ternary", "bitwise", "twos_complement"])
@torch.no_grad()
def test_trains_equal_counts(pattern, ids, code):
    model = small_model(spike_sites=SITES, **pattern)
    whole = model(ids).logits
    with execute_trains(model, code):
        assert differ(model(ids).logits, whole) < EXACT
    assert differ(model(ids).logits, whole) == 0


@torch.no_grad()
def test_float32_without_spikes_meets_tier_two(pattern, ids):
    model = small_model(dtype=torch.float32, **pattern)
    assert differ(in_chunks(model, ids, range(1, LENGTH)), model(ids).logits) < 1e-4


@torch.no_grad()
def test_eager_equals_sdpa(pattern, ids):
    model = small_model(**pattern)
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    assert differ(model(ids).logits, logits) < EXACT


def test_memory_of_linear_and_window_layers_is_constant():
    linear = ("gla", "gla+swa", "gla+swa-apart", "window_linear", "delta", "delta+swa", "egru", "egru-stack")
    for name in ("swa", "swa-sinks", *linear):
        model = small_model(**PATTERNS[name])
        sizes = []
        for length in (16, 64):
            with torch.no_grad():
                sizes.append(model(torch.randint(0, 97, (1, length)), use_cache=True)[CACHE_NAME].nbytes)
        assert sizes[0] == sizes[1], name


@torch.no_grad()
def test_one_layer_keeps_float32_codes_up_to_its_threshold(ids):
    """Tier 3: on the same input, no count differs between one pass and chunks unless it sits on a threshold."""
    model = small_model(dtype=torch.float32, spike_sites=SITES, num_hidden_layers=1, mixers="gla+swa")
    seen: dict[str, list] = {"whole": [], "chunks": []}

    def run(name, call):
        def observe(site, counts, threshold, context):
            seen[name].append((site.name, counts, threshold))

        sites = [m for m in model.modules() if type(m).__name__ == "SpikeSite"]
        for site in sites:
            site.observers.append(observe)
        call()
        for site in sites:
            site.observers.clear()

    run("whole", lambda: model(ids))
    run("chunks", lambda: in_chunks(model, ids, [5, 17]))
    for site in SITES:
        whole = next(c for name, c, _ in seen["whole"] if name == site)
        chunks = torch.cat([c for name, c, _ in seen["chunks"] if name == site], 1)
        # A rounding difference can move a value over a threshold by one count, never by more.
        assert (whole - chunks).abs().max() <= 1
        assert (whole != chunks).float().mean() < 1e-3


def test_classes_say_what_generate_must_know():
    assert SpikeLMForCausalLM._is_stateful
