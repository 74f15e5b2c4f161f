"""SpikeGPT and RWKV-4 as published: small random checkpoints in their layout, and their forward pass, line by line.

Written from the published equations (arXiv 2302.13939, arXiv 2305.13048) and the published names of tensors alone;
nothing of spikelm is used. One text, token after token, sums over the whole past written out.
"""

import torch
import torch.nn.functional as F

VOCABULARY, WIDTH, INNER, LAYERS = 61, 32, 128, 3


def published_tensors(dtype=torch.float32, seed=0) -> dict:
    """Name -> tensor of a random checkpoint, loud enough for neurons to fire; norms and mixes far from the start."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator)

    def share(*shape):
        return torch.rand(*shape, generator=generator)

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + normal(WIDTH, scale=0.3), normal(WIDTH, scale=0.3)

    tensors = {"emb.weight": normal(VOCABULARY, WIDTH)}
    norm("blocks.0.ln0")
    for i in range(LAYERS):
        block = f"blocks.{i}"
        norm(f"{block}.ln1")
        norm(f"{block}.ln2")
        tensors[f"{block}.att.time_decay"] = normal(WIDTH, scale=2.0) - 1
        tensors[f"{block}.att.time_first"] = normal(WIDTH)
        for name in "kvr":
            tensors[f"{block}.att.time_mix_{name}"] = share(1, 1, WIDTH)
        for name, scale in (("key", 1.0), ("value", 1.0), ("receptance", 1.0), ("output", 4.0)):
            tensors[f"{block}.att.{name}.weight"] = normal(WIDTH, WIDTH, scale=scale * WIDTH**-0.5)
        for name in "kr":
            tensors[f"{block}.ffn.time_mix_{name}"] = share(1, 1, WIDTH)
        tensors[f"{block}.ffn.key.weight"] = normal(INNER, WIDTH, scale=WIDTH**-0.5)
        tensors[f"{block}.ffn.receptance.weight"] = normal(WIDTH, WIDTH, scale=WIDTH**-0.5)
        tensors[f"{block}.ffn.value.weight"] = normal(WIDTH, INNER, scale=5 * INNER**-0.5)
    norm("ln_out")
    tensors["head.weight"] = normal(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def wkv(keys, values, time_decay, time_first):
    """The average for the last of the tokens whose keys and values are given (lists of `[C]`)."""
    newest, w = len(keys) - 1, -time_decay.exp()
    weights = [((newest - 1 - i) * w + keys[i]).exp() for i in range(newest)]
    weights.append((time_first + keys[newest]).exp())
    return sum(p * v for p, v in zip(weights, values, strict=True)) / sum(weights)


def lif(membrane, current):
    """One step of a unit with tau 2, threshold 1 and a hard reset to 0, its input decayed too: spikes, membrane."""
    charged = membrane + (current - membrane) / 2.0
    spikes = (charged >= 1.0).to(charged.dtype)
    return spikes, charged * (1 - spikes)


def fresh():
    """The states of one block at the start of a window."""
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    return {"att": zero, "ffn": zero, "keys": [], "values": [], "membrane_att": zero, "membrane_ffn": zero}


def published_forward(tensors, windows, spiking=True, binary=True, carried=False):
    """Logits `[T, vocabulary]` in float64 of windows of token ids, one after the other, and the spikes of each neuron.

    Spikes are `[T, C]` for mixer and ffn of each block, in order; none for RWKV-4 (`spiking` and `binary` False). The
    published training and evaluation begin every window from zero states; `carried`: from where the last one ended.
    """
    P = {name: tensor.double() for name, tensor in tensors.items()}
    logits, fired = [], [[] for _ in range(2 * LAYERS)]
    states = None

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), P[f"{name}.weight"], P[f"{name}.bias"], 1e-5)

    def shifted(name, x, before):
        mu = P[name].reshape(WIDTH)
        return x * mu + before * (1 - mu)

    for window in windows:
        if states is None or not carried:
            states = [fresh() for _ in range(LAYERS)]
        for token in window:
            x = P["emb.weight"][token]
            if binary:
                x = (x >= 0).double()
            x = norm("blocks.0.ln0", x)
            for i, S in enumerate(states):
                att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"

                a, before = norm(f"blocks.{i}.ln1", x), S["att"]
                S["att"] = a
                S["keys"].append(P[f"{att}.key.weight"] @ shifted(f"{att}.time_mix_k", a, before))
                S["values"].append(P[f"{att}.value.weight"] @ shifted(f"{att}.time_mix_v", a, before))
                r = torch.sigmoid(P[f"{att}.receptance.weight"] @ shifted(f"{att}.time_mix_r", a, before))
                y = wkv(S["keys"], S["values"], P[f"{att}.time_decay"], P[f"{att}.time_first"])
                y = P[f"{att}.output.weight"] @ (r * y)
                if spiking:
                    y, S["membrane_att"] = lif(S["membrane_att"], y)
                    fired[2 * i].append(y)
                x = x + y

                a, before = norm(f"blocks.{i}.ln2", x), S["ffn"]
                S["ffn"] = a
                k = torch.relu(P[f"{ffn}.key.weight"] @ shifted(f"{ffn}.time_mix_k", a, before)) ** 2
                r = torch.sigmoid(P[f"{ffn}.receptance.weight"] @ shifted(f"{ffn}.time_mix_r", a, before))
                y = r * (P[f"{ffn}.value.weight"] @ k)
                if spiking:
                    y, S["membrane_ffn"] = lif(S["membrane_ffn"], y)
                    fired[2 * i + 1].append(y)
                x = x + y
            logits.append(P["head.weight"] @ norm("ln_out", x))
    return torch.stack(logits), [torch.stack(spikes) for spikes in fired if spikes]
