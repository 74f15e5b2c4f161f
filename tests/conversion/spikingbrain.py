"""SpikingBrain as published: small random checkpoints in its layout, and its forward pass, line by line.

Written from the published equations (section numbers: the report, arXiv 2509.05276, and its release) and from the
published names of tensors alone; nothing of spikelm is used.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 61,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 6,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
GROUP = 128


def published_config(**changes) -> dict:
    """A config.json with the published fields, code references included."""
    return {
        "architectures": ["GLAswaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM"},
        "attn_mode": "chunk",
        "model_type": "gla_swa",
        "hidden_act": "swish",
        "bos_token_id": 1,
        "eos_token_id": 1,
        **SIZES,
        **changes,
    }


def published_tensors(w8=False, on_grid=True, dtype=torch.float32, seed=0) -> dict:
    """Name -> tensor of a random checkpoint; norms far from one, biases far from zero, codes beyond int8."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    width, inner, vocab, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"], 64
    shared = SIZES["num_key_value_heads"] * head
    tensors = {}

    def projection(name, rows, columns):
        weight = normal(rows, columns) * 1.5 * columns**-0.5
        if w8:
            groups = weight.view(rows, -1, GROUP)
            scales = (
                groups.abs().amax(-1, keepdim=True)
                / 127
                * torch.empty(rows, columns // GROUP, 1).uniform_(0.7, 1.3, generator=generator)
            )
            if on_grid:
                weight = ((groups / scales).round() * scales).view(rows, columns)
            tensors[f"{name}.weight_quantizer.scales"] = scales
        tensors[f"{name}.weight"] = weight

    def vector(name, size, centre=0.0):
        tensors[name] = centre + 0.3 * normal(size)

    tensors["model.embeddings.weight"] = normal(vocab, width)
    for i in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        vector(f"{layer}.attn_norm.weight", width, 1.0)
        vector(f"{layer}.mlp_norm.weight", width, 1.0)
        for name, rows in (("q", width), ("k", shared), ("v", shared)):
            projection(f"{layer}.attn.{name}_proj", rows, width)
            vector(f"{layer}.attn.{name}_proj.bias", rows)
        projection(f"{layer}.attn.o_proj", width, width)
        projection(f"{layer}.mlp.gate_proj", inner, width)
        projection(f"{layer}.mlp.up_proj", inner, width)
        projection(f"{layer}.mlp.down_proj", width, inner)
        if i % 2 == 0:
            vector(f"{layer}.attn.g_norm.weight", head, 1.0)
            if w8:
                projection(f"{layer}.attn.gk_proj", shared, width)
                vector(f"{layer}.attn.gk_proj.bias", shared)
            else:
                tensors[f"{layer}.attn.gk_proj.0.weight"] = normal(16, width) * width**-0.5
                tensors[f"{layer}.attn.gk_proj.1.weight"] = normal(shared, 16)
                vector(f"{layer}.attn.gk_proj.1.bias", shared)
    vector("model.norm.weight", width, 1.0)
    tensors["lm_head.weight"] = normal(vocab, width) * width**-0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_published(folder, tensors, config=None, files=1, pickled=False):
    """A folder as published: config.json, and weights in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or published_config()))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    save = torch.save if pickled else save_file
    names = list(tensors)
    places = {}
    for i in range(files):
        file = f"{stem}.{suffix}" if files == 1 else f"{stem}-{i + 1:05}-of-{files:05}.{suffix}"
        part = {name: tensors[name] for name in names[i::files]}
        save(part, folder / file)
        places |= dict.fromkeys(part, file)
    if files > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def published_forward(tensors, ids, prefill, w8=False):
    """Logits `[T, vocab]` in float64 of one text, and the counts of every coded activation, in order.

    The first `prefill` tokens are read at once, the others one by one. What a token sees depends on that in one way:
    its window holds `sliding_window` + 1 keys in the prefill and `sliding_window` after it (1.2).
    """
    P = {name: tensor.double() for name, tensor in tensors.items()}
    H, K, D, window = 4, 2, 64, SIZES["sliding_window"]
    length, seen = len(ids), []

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def coded(x):  # 2.1, 6.4: steps 1, 2 and 4
        if not w8:
            return x
        threshold = (x.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
        counts = (x / threshold).round()
        seen.append(counts)
        return counts * threshold

    def project(x, name):  # x is coded already; 6.4: steps 5 and 6, float32 as the file is
        weight = P[f"{name}.weight"]
        if w8:
            scales = tensors[f"{name}.weight_quantizer.scales"]
            groups = tensors[f"{name}.weight"].view(len(weight), -1, GROUP)
            weight = ((groups / scales).round() * scales).view(weight.shape).double()
        return F.linear(x, weight, P.get(f"{name}.bias"))

    def rotated(x):  # x [T, heads, D]; tables in float32
        frequencies = 1.0 / SIZES["rope_theta"] ** (torch.arange(0, D, 2).float() / D)
        angles = torch.arange(length).float()[:, None] * frequencies
        cos, sin = (torch.cat([table, table], -1).double()[:, None] for table in (angles.cos(), angles.sin()))
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    def int8(x):  # 2.3: per token and head
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(1e-5, 1e4)
        return (x / scale).round().clamp(-128, 127) * scale

    def windowed(q, k, v):
        q, k = rotated(q), rotated(k)
        if w8:
            threshold = (q.abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
            q, k, v = (q / threshold).round() * threshold, int8(k), int8(v)
        out = torch.zeros_like(q)
        for t in range(length):
            first = max(0, t - window if t < prefill and prefill > 1 else t - window + 1)
            for h in range(H):
                scores = k[first : t + 1, h // (H // K)] @ q[t, h] * D**-0.5
                out[t, h] = scores.softmax(0) @ v[first : t + 1, h // (H // K)]
        return out

    def linear_attention(q, k, v, logits, weight):
        q, k, decay = q.relu() * D**-0.5, k.relu(), torch.exp(F.logsigmoid(logits) / 16).view(length, K, D)
        state, out = torch.zeros(H, D, D, dtype=torch.float64), torch.zeros_like(q)
        for t in range(length):
            for h in range(H):
                g = h // (H // K)
                state[h] = decay[t, g][:, None] * state[h] + torch.outer(k[t, g], v[t, g])
                out[t, h] = q[t, h] @ state[h]
        return norm(out, weight)

    x = P["model.embeddings.weight"][ids]
    for i in range(SIZES["num_hidden_layers"]):
        attn, mlp = f"model.layers.{i}.attn", f"model.layers.{i}.mlp"
        y = coded(norm(x, P[f"model.layers.{i}.attn_norm.weight"]))
        q, k, v = (project(y, f"{attn}.{p}_proj").view(length, -1, D) for p in "qkv")
        if i % 2 == 1:
            heads = windowed(q, k, v)
        else:
            low = y if w8 else F.linear(y, P[f"{attn}.gk_proj.0.weight"])
            logits = project(low, f"{attn}.gk_proj" if w8 else f"{attn}.gk_proj.1")
            heads = linear_attention(q, k, v, logits, P[f"{attn}.g_norm.weight"])
        x = x + project(coded(heads.reshape(length, -1)), f"{attn}.o_proj")
        y = coded(norm(x, P[f"model.layers.{i}.mlp_norm.weight"]))
        inner = F.silu(project(y, f"{mlp}.gate_proj")) * project(y, f"{mlp}.up_proj")
        x = x + F.linear(inner, P[f"{mlp}.down_proj.weight"])  # neither coded nor rounded (2.3)
    return F.linear(norm(x, P["model.norm.weight"]), P["lm_head.weight"]), seen
