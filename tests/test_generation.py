"""`generate` in every mode of a stateful model, equal to the uncached path (float64)."""

import copy

import pytest
import torch

from small_models import SITES, small_model
from spikelm import SpikeCache
from spikelm.cache import CACHE_NAME

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model(pattern):
    return small_model(spike_sites=SITES, **pattern)


@pytest.fixture
def ids():
    return torch.randint(2, 97, (2, 9))


def same(a, b):
    return a.shape == b.shape and bool((a == b).all())


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
def test_cached_equals_uncached(model, ids, mode):
    options = OPTIONS | mode
    torch.manual_seed(1)
    cached = model.generate(ids, **options)
    torch.manual_seed(1)
    assert same(cached, model.generate(ids, use_cache=False, **options))


def test_left_padded_batch_equals_single_texts(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert same(batch[0, 9:], model.generate(ids[:1, 3:], **OPTIONS)[0, 6:])
    assert same(batch[1], model.generate(ids[1:], **OPTIONS)[0])


def test_padded_beams_equal_single_beams(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = OPTIONS | {"num_beams": 3}
    batch = model.generate(ids, attention_mask=mask, **options)
    assert same(batch[0, 9:], model.generate(ids[:1, 3:], **options)[0, 6:])


def test_chunked_prefill(model, ids):
    assert same(model.generate(ids, prefill_chunk_size=4, **OPTIONS), model.generate(ids, **OPTIONS))


def test_continuation_from_a_returned_cache(model, ids):
    first = model.generate(ids, return_dict_in_generate=True, **OPTIONS)
    text = torch.cat([first.sequences, ids[:, :3]], 1)
    options = OPTIONS | {"attention_mask": torch.ones_like(text)}  # else generate takes a token 0 for padding
    continued = model.generate(text, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    assert same(continued, model.generate(text, **options))


def test_embeddings_instead_of_tokens(model, ids):
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **OPTIONS)
    assert same(from_embeddings, model.generate(ids, **OPTIONS)[:, 9:])


def test_several_sequences_per_prompt(model, ids):
    options = OPTIONS | {"num_beams": 4, "num_return_sequences": 2}
    assert same(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_other_caches_are_refused_with_a_reason(model, ids):
    with pytest.raises(ValueError, match="SpikeCache"):
        model.generate(ids, cache_implementation="static", **OPTIONS)
    with pytest.raises(ValueError, match="SpikeCache"):
        from transformers import DynamicCache

        model(ids, cache=DynamicCache())


@torch.no_grad()
def test_the_older_name_of_the_cache_is_understood(model, ids):
    start = model(ids[:, :6], use_cache=True)[CACHE_NAME]
    again = copy.deepcopy(start)
    assert torch.equal(model(ids[:, 6:], past_key_values=start).logits, model(ids[:, 6:], cache=again).logits)
    with pytest.raises(ValueError, match="two names"):
        model(ids, cache=start, past_key_values=again)


@torch.no_grad()
def test_cache_rows_can_be_selected_repeated_saved_and_reset(model, ids, tmp_path):
    def step(cache, rows):
        return model(ids[rows, 6:], cache=cache, use_cache=True).logits

    start = model(ids[:, :6], use_cache=True)[CACHE_NAME]
    expected = step(copy.deepcopy(start), [0, 1])

    swapped = copy.deepcopy(start)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert (step(swapped, [1, 0]) - expected[[1, 0]]).abs().max() < 1e-12

    repeated = copy.deepcopy(start)
    repeated.batch_repeat_interleave(2)
    assert (step(repeated, [0, 0, 1, 1]) - expected[[0, 0, 1, 1]]).abs().max() < 1e-12

    torch.save(start.state_dict(), tmp_path / "cache.pt")
    loaded = SpikeCache(model.config)
    loaded.load_state_dict(torch.load(tmp_path / "cache.pt", weights_only=True))
    assert loaded.get_seq_length() == 6
    assert (step(loaded, [0, 1]) - expected).abs().max() == 0

    loaded.reset()
    assert loaded.get_seq_length() == 0 and loaded.nbytes == 0
    with pytest.raises(ValueError, match="cropped"):
        start.crop(3)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": 8,
    "factor": 4.0,
}


def test_text_that_outgrows_short_longrope():
    """Decoding with a cache goes on as without one; what cannot be rotated anew is refused."""
    model = small_model(mixers="attention", rope_parameters=LONG_ROPE)
    tokens = torch.randint(0, 97, (2, 6))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))
    with pytest.raises(ValueError, match="start from tokens"):
        model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **options)
