"""Retention against a straight re-statement of its equations."""

import torch
import torch.nn.functional as F

from small_models import small_model
from spikelm.mixers.attention import rotate


@torch.no_grad()
def test_layer_follows_the_published_equations():
    model, seen = small_model(mixers="retention"), {}
    mixer = model.model.layers[1].mixer
    mixer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], rope=args[1].rope, y=output))
    model(torch.randint(0, 97, (1, 19)))
    x, core, (cos, sin) = seen["x"][0], mixer.retention, seen["rope"]["global"]

    def heads(projection, count):
        turned = (x @ projection.weight.T).view(1, -1, count, 8).transpose(1, 2)
        return turned

    q, k = (rotate(heads(p, n), cos, sin)[0] for p, n in ((mixer.q_proj, 4), (mixer.k_proj, 2)))
    v = heads(mixer.v_proj, 2)[0]
    out = torch.zeros(19, 4, 8, dtype=x.dtype)
    for h in range(4):
        gamma = 1 - 2.0 ** (-5 - h // 2)
        for t in range(19):
            weights = torch.stack([gamma ** (t - s) * (q[h, t] @ k[h // 2, s]) / 8**0.5 for s in range(t + 1)])
            out[t, h] = weights @ v[h // 2, : t + 1]
    normed = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6) * core.norm.weight
    gated = normed.flatten(1) * F.silu(x @ core.g_proj.weight.T)
    assert (gated @ mixer.o_proj.weight.T - seen["y"][0]).abs().max() < 1e-9
