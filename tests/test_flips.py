"""Tier 3 for a whole model: float32 with spikes on, one pass against chunks, on the real SmolLM2.

A count on a threshold flips by rounding, and the flip grows through the layers: the counts are not asked to agree.
How many differ is printed, and the mean negative log-likelihood has to agree within 0.01 nats over 8,000 tokens.

    pytest -m slow -s tests/test_flips.py
"""

import pytest
import torch
import torch.nn.functional as F

import spikelm
from spikelm.cache import CACHE_NAME
from spikelm.conversion.smollm import smollm2_gguf
from spikelm.conversion.texts import evaluation_sample
from spikelm.loading import load_model
from spikelm.spiking import spike_groups

TOKENS, WINDOW, CHUNK = 8000, 500, 100


@pytest.mark.slow
@torch.no_grad()
def test_flip_rate_and_likelihood_of_chunks():
    torch.set_num_threads(2)
    source, tokenizer = load_model(smollm2_gguf(), progress=False)
    model = spikelm.convert(source, k=4, dead_zone=0.375, progress=False)
    layers: dict[int, list[torch.Tensor]] = {}
    for group in spike_groups(model):
        group.site.observers.append(lambda site, counts, *_: layers.setdefault(site.layer_idx, []).append(counts[0]))

    def nll(ids, cuts):
        """Sum of -log p, and the counts of every layer `[tokens, channels of its sites]`."""
        layers.clear()
        cache, logits = None, []
        for piece in ids.split(cuts, dim=1):
            out = model(piece, cache=cache, use_cache=True)
            cache, logits = out[CACHE_NAME], [*logits, out.logits[0]]
        loss = F.cross_entropy(torch.cat(logits)[:-1], ids[0, 1:], reduction="sum").item()
        return loss, {i: torch.cat([torch.cat(counts[s::4]) for s in range(4)], 1) for i, counts in layers.items()}

    ids = tokenizer(evaluation_sample(), return_tensors="pt")["input_ids"][:, :TOKENS]
    losses, flipped, counted = [0.0, 0.0], {}, 0
    for window in ids.split(WINDOW, dim=1):
        (whole, a), (chunked, b) = nll(window, WINDOW), nll(window, CHUNK)
        losses[0] += whole
        losses[1] += chunked
        counted += window.shape[1]
        for layer in a:
            flipped.setdefault(layer, []).append((a[layer] != b[layer]).float().mean().item())
    rates = {layer: sum(shares) / len(shares) for layer, shares in flipped.items()}
    print(
        "\nshare of counts that differ, by layer:", {k: f"{v:.2e}" for k, v in rates.items() if k in (0, 1, 5, 10, 29)}
    )
    difference = (losses[1] - losses[0]) / counted
    print(f"difference of the mean negative log-likelihood: {difference:+.5f} nats over {counted} tokens")
    assert abs(difference) < 0.01
