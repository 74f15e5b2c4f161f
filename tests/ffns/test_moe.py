"""The routed mixture against a loop over tokens; where its spikes are counted."""

import torch

from small_models import small_config, small_model
from spikelm.ffns.moe import MixtureFFN
from spikelm.spiking import SpikeStatistics


@torch.no_grad()
def test_every_token_takes_its_likeliest_experts():
    model, seen = small_model(ffns="moe", moe_experts=4, moe_top_k=2), {}
    ffn = model.model.layers[1].ffn
    ffn.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], y=output[0]))
    model(torch.randint(0, 97, (1, 15)))

    def gated(module, x):
        inner = torch.nn.functional.silu(module.gate_proj.weight @ x) * (module.up_proj.weight @ x)
        return module.down_proj.weight @ inner

    taken = set()
    for x, y in zip(seen["x"], seen["y"]):
        p = torch.softmax(ffn.router.weight @ x, 0)
        best = p.topk(2).indices.tolist()
        taken |= set(best)
        expected = gated(ffn.shared, x) + sum(p[i] * gated(ffn.experts[i], x) for i in best)
        assert (expected - y).abs().max() < 1e-6  # the router's softmax is float32
    assert len(taken) > 2


@torch.no_grad()
def test_padding_reaches_no_expert():
    model = small_model(ffns="moe", moe_experts=2, spike_sites=["gate_up"])
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with SpikeStatistics(model) as statistics:
        model(ids, attention_mask=mask)
    rows = statistics.by_site()
    for layer in range(3):
        routed = [r["tokens"] for r in rows if r["layer"] == layer and "experts" in r["path"]]
        assert sum(routed) == mask.sum()
    assert isinstance(model.model.layers[0].ffn, MixtureFFN) and small_config().ffns == ["gated"] * 3
