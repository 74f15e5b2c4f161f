"""RWKV-7 `.pth` files against the published forward pass, in float64, and their way back."""

import math
import re

import pytest
import torch

from spikelm import SpikeLMForCausalLM, presets
from spikelm.conversion.convert import blank_model
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.conversion.published import KINDS
from tests.conversion.test_importing import refused
from tests.conversion.test_published_spikingbrain import bits, load

VOCAB, WIDTH, INNER, LAYERS, HEADS = 61, 128, 192, 3, 2
RANKS = {"w": 12, "a": 10, "v": 6, "g": 16}
LENGTH = 21


def published_tensors(dtype=torch.float32, idle=False, seed=0) -> dict:
    """Name -> tensor of a random checkpoint; decays fast and slow, norms far from one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, centre=0.0, scale=0.3):
        return centre + scale * torch.randn(*shape, generator=generator)

    def norm(name):
        return {f"{name}.weight": normal(WIDTH, centre=1.0), f"{name}.bias": normal(WIDTH)}

    tensors = {"emb.weight": normal(VOCAB, WIDTH, scale=1.0)} | norm("blocks.0.ln0")
    for i in range(LAYERS):
        block, att = f"blocks.{i}", f"blocks.{i}.att"
        tensors |= norm(f"{block}.ln1") | norm(f"{block}.ln2") | norm(f"{att}.ln_x")
        for z in "rwkvag":
            tensors[f"{att}.x_{z}"] = normal(1, 1, WIDTH, centre=0.5)
        for z, rank in RANKS.items():
            if z == "v" and i == 0 and not idle:
                continue
            tensors[f"{att}.{z}1"] = normal(WIDTH, rank, scale=1.5 * WIDTH**-0.5)
            tensors[f"{att}.{z}2"] = normal(rank, WIDTH, scale=1.5 * rank**-0.5)
            if z != "g":
                tensors[f"{att}.{z}0"] = normal(1, 1, WIDTH, scale=1.5)
        tensors[f"{att}.k_k"] = normal(1, 1, WIDTH, centre=0.7)
        tensors[f"{att}.k_a"] = normal(1, 1, WIDTH, centre=1.0)
        tensors[f"{att}.r_k"] = normal(HEADS, WIDTH // HEADS)
        for name in ("receptance", "key", "value", "output"):
            tensors[f"{att}.{name}.weight"] = normal(WIDTH, WIDTH, scale=WIDTH**-0.5)
        tensors[f"{block}.ffn.x_k"] = normal(1, 1, WIDTH, centre=0.5)
        tensors[f"{block}.ffn.key.weight"] = normal(INNER, WIDTH, scale=WIDTH**-0.5)
        tensors[f"{block}.ffn.value.weight"] = normal(WIDTH, INNER, scale=INNER**-0.5)
    tensors |= norm("ln_out") | {"head.weight": normal(VOCAB, WIDTH, scale=WIDTH**-0.5)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def published_forward(tensors, ids):
    """Logits `[T, vocab]` in float64, one token after the other, from the published equations and names alone."""
    P = {name: tensor.double() for name, tensor in tensors.items()}
    N = WIDTH // HEADS
    zeros = torch.zeros(LAYERS, WIDTH, dtype=torch.float64)
    before = {"att": zeros.clone(), "ffn": zeros.clone()}
    state = torch.zeros(LAYERS, HEADS, N, N, dtype=torch.float64)  # rows: values, columns: keys
    logits = []

    def norm(x, name):
        return (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5) * P[f"{name}.weight"] + P[f"{name}.bias"]

    for token in ids:
        x = norm(P["emb.weight"][token], "blocks.0.ln0")
        first = None
        for i in range(LAYERS):
            block, att = f"blocks.{i}", f"blocks.{i}.att"
            y = norm(x, f"{block}.ln1")
            z = {n: y + (before["att"][i] - y) * P[f"{att}.x_{n}"][0, 0] for n in "rwkvag"}
            before["att"][i] = y
            r = P[f"{att}.receptance.weight"] @ z["r"]
            k = P[f"{att}.key.weight"] @ z["k"]
            v = P[f"{att}.value.weight"] @ z["v"]
            w = P[f"{att}.w0"][0, 0] + torch.tanh(z["w"] @ P[f"{att}.w1"]) @ P[f"{att}.w2"]
            d = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-w)))
            a = torch.sigmoid(P[f"{att}.a0"][0, 0] + z["a"] @ P[f"{att}.a1"] @ P[f"{att}.a2"])
            g = torch.sigmoid(z["g"] @ P[f"{att}.g1"]) @ P[f"{att}.g2"]
            if i == 0:
                first = v
            else:
                v = v + (first - v) * torch.sigmoid(P[f"{att}.v0"][0, 0] + z["v"] @ P[f"{att}.v1"] @ P[f"{att}.v2"])
            kk = k * P[f"{att}.k_k"][0, 0]
            k = k * (1 + (a - 1) * P[f"{att}.k_a"][0, 0])
            heads = []
            for h in range(HEADS):
                c = slice(h * N, (h + 1) * N)
                unit, S = kk[c] / kk[c].norm(), state[i, h]
                S = S * d[c] - torch.outer(S @ unit, unit * a[c]) + torch.outer(v[c], k[c])
                out, state[i, h] = S @ r[c], S
                out = (out - out.mean()) / torch.sqrt(out.var(correction=0) + 64e-5)
                out = out * P[f"{att}.ln_x.weight"][c] + P[f"{att}.ln_x.bias"][c]
                heads.append(out + (r[c] * k[c] * P[f"{att}.r_k"][h]).sum() * v[c])
            x = x + P[f"{att}.output.weight"] @ (torch.cat(heads) * g)
            y = norm(x, f"{block}.ln2")
            z_k = y + (before["ffn"][i] - y) * P[f"{block}.ffn.x_k"][0, 0]
            before["ffn"][i] = y
            x = x + P[f"{block}.ffn.value.weight"] @ torch.relu(P[f"{block}.ffn.key.weight"] @ z_k) ** 2
        logits.append(P["head.weight"] @ norm(x, "ln_out"))
    return torch.stack(logits)


def written(place, tensors):
    torch.save(tensors, place / "RWKV-x070.pth")
    return place / "RWKV-x070.pth"


def imported(place, tensors):
    record = import_checkpoint("rwkv7", written(place, tensors), place / "ours", progress=False)
    return place / "ours", record


@pytest.mark.parametrize("prefill", [1, 5, LENGTH])
@torch.no_grad()
def test_forward_is_the_published_one(prefill, tmp_path):
    """Read at once and token by token."""
    tensors = published_tensors(idle=prefill == 5)
    model = load(imported(tmp_path, tensors)[0])
    ids = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
    out = model(ids[None, :prefill], use_cache=True)
    logits = [out.logits]
    for t in range(prefill, LENGTH):
        out = model(ids[None, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    expected = published_forward(tensors, ids)
    assert expected.std() > 0.3, "the logits say too little"
    assert (torch.cat(logits, 1)[0] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_every_tensor_but_the_idle_ones_is_read():
    tensors, ids = published_tensors(idle=True), torch.arange(6)
    expected = published_forward(tensors, ids)
    silent = set()
    for name, tensor in tensors.items():
        changed = published_forward(tensors | {name: tensor + 0.1 * torch.randn_like(tensor)}, ids)
        if torch.equal(changed, expected):
            silent.add(name)
    assert silent == {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("idle", [False, True], ids=["no-idle", "idle"])
def test_export_gives_back_every_bit(idle, dtype, tmp_path):
    tensors = published_tensors(dtype, idle)
    ours, record = imported(tmp_path, tensors)
    export_checkpoint("rwkv7", ours, tmp_path / "back", progress=False)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["rwkv7.pth"]
    back = torch.load(tmp_path / "back" / "rwkv7.pth", weights_only=True)
    count = 6 + 33 * LAYERS - (0 if idle else 3)
    assert set(back) == set(tensors) and record["keys"] == {"source_tensors": count, "filled": count, "new": 0}
    for name, tensor in tensors.items():
        assert back[name].dtype is dtype and back[name].is_contiguous() and back[name].shape == tensor.shape
        assert torch.equal(bits(back[name]), bits(tensor)), name


def test_idle_tensors_are_kept_by_a_model_and_are_no_parameters(tmp_path):
    tensors = published_tensors(idle=True)
    ours, record = imported(tmp_path, tensors)
    model = SpikeLMForCausalLM.from_pretrained(ours)
    idle = sum(tensors[f"blocks.0.att.v{n}"].numel() for n in range(3))
    assert record["result"]["parameters"] == sum(t.numel() for t in tensors.values()) - idle
    model.save_pretrained(tmp_path / "saved")
    export_checkpoint("rwkv7", tmp_path / "saved", tmp_path / "back", progress=False)
    back = torch.load(tmp_path / "back" / "rwkv7.pth", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("head.weight"), r"lacks 1 of its 105: head\.weight"),
        (lambda t: t.pop("blocks.1.att.x_g"), r"lacks 1 of its 105: blocks\.1\.att\.x_g"),
        (lambda t: t.pop("blocks.0.att.r_k"), r"not a RWKV-7 one: it lacks blocks\.0\.att\.r_k"),
        (lambda t: t.pop("blocks.0.att.v0"), r"lacks 1 of its 105: blocks\.0\.att\.v0"),
        (lambda t: t.update({"blocks.2.ffn.s_emb": torch.zeros(1)}), r"holds 1 tensors .* not: blocks\.2\.ffn\.s_emb"),
        (
            lambda t: t.update({"blocks.9.ln3.bias": torch.zeros(1)}),
            r"holds 1 tensors .* not: blocks\.9\.ln3\.bias; and lacks 33",
        ),
        (lambda t: t.update({"blocks.1.att.w0": torch.zeros(WIDTH)}), r"w0 .* shape \[128\]; .* \[1, 1, 128\]"),
        (lambda t: t.update({"blocks.2.att.w1": torch.zeros(WIDTH, 13)}), r"w1 .* \[128, 13\]; .* \[128, 12\]"),
        (lambda t: t.update({"blocks.0.att.w1": torch.zeros(WIDTH)}), r"w1 has shape \[128\]; expected two dimensions"),
        (lambda t: t.update({"blocks.0.att.r_k": torch.zeros(4, 32)}), "are 32 wide; expected 64"),
    ],
)
def test_tensors_that_do_not_fit(damage, said, tmp_path):
    tensors = published_tensors(idle=True)
    damage(tensors)
    assert re.search(said, refused("rwkv7", written(tmp_path, tensors), tmp_path))


def test_models_that_the_format_cannot_express(tmp_path):
    """A preset can be exported; with spikes, or with heads of another width, it cannot."""
    config = presets.get("rwkv7-tiny")
    SpikeLMForCausalLM(config).save_pretrained(tmp_path / "model")
    export_checkpoint("rwkv7", tmp_path / "model", tmp_path / "back", progress=False)
    import_checkpoint("rwkv7", tmp_path / "back", tmp_path / "again", progress=False)
    first, again = (SpikeLMForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("model", "again"))
    assert set(first) == set(again) and all(torch.equal(first[name], again[name]) for name in first)
    for i, (changes, said) in enumerate(
        (
            ({"spike_sites": ["qkv"]}, "spike_sites"),
            ({"head_dim": 32, "num_attention_heads": 4}, "as rwkv7; its heads (blocks.0.att.r_k) are 32 wide"),
        )
    ):
        spiking = type(config)(**presets.PRESETS["rwkv7-tiny"] | changes)
        SpikeLMForCausalLM(spiking).save_pretrained(tmp_path / str(i))
        assert said in refused("rwkv7", tmp_path / str(i), tmp_path, do=export_checkpoint)


def test_release_has_the_published_number_of_values():
    """Every tensor of the trainer's 0.1B model, the idle ones included: 191,084,544 values in 402 tensors."""
    fields = presets.PRESETS["rwkv7-0.1b"] | {"rwkv_idle_value_mix": True}
    model = blank_model(SpikeLMForCausalLM.config_class(**fields))
    ours, table = model.state_dict(), {}
    for rule in KINDS["rwkv7"].rules(model.config):
        table |= zip(rule.published, rule.write(*(ours[name] for name in rule.ours)), strict=True)
    assert len(table) == 402 and sum(tensor.numel() for tensor in table.values()) == 191_084_544
    fields = KINDS["rwkv7"].fields({}, {name: tensor.shape for name, tensor in table.items()})
    assert (fields["rwkv_decay_rank"], fields["rwkv_value_rank"], fields["rwkv_gate_rank"]) == (64, 32, 128)
    assert table["blocks.3.att.w1"].shape == (768, 64) and table["blocks.3.att.r_k"].shape == (12, 64)
