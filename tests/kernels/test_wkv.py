"""WKV: every path against the definition, masks, packing, pieces and steps, memory, errors."""

import pytest
import torch
from kernel_cases import RATIOS, assert_close, banded, place, tiers

from spikelm.kernels.wkv import EMPTY, chunked_wkv, wkv, wkv_reference, wkv_step

SHAPES = {
    "T1": (2, 1, 3, ()),
    "C1": (2, 15, 1, ()),
    "T15": (2, 15, 20, ()),
    "T37": (1, 37, 33, ()),
    "T63": (2, 63, 17, ()),
    "T100": (3, 100, 20, ()),
    "packed": (1, 40, 33, (0, 0, 6, 6, 7, 40)),
    "packed-tiny": (1, 9, 5, (0, 0, 4, 9)),
    "empty": (2, 0, 4, ()),
    "no-rows": (0, 5, 4, ()),
    "empty-packed": (1, 0, 4, (0, 0)),
}
NAMES = ("y", "state", "dk", "dv", "dw", "du", "dstate")
EVERYTHING = ("middle", "weak", "strong", "large", "masked")


def problem(shape, kind, dtype, device, wide=None):
    """Leaves k, v, w, u, state; bounds and masks; gradients of y and state. `wide`: the same numbers in that dtype."""
    batch, length, width, bounds = SHAPES[shape]
    random = torch.Generator().manual_seed(length + 7 * EVERYTHING.index(kind))
    k, v, dy = (torch.randn(batch, length, width, generator=random) for _ in range(3))
    decay = {"weak": 0.01, "strong": 30.0}.get(kind, 2.0)
    w, u = -decay * torch.rand(width, generator=random), torch.randn(width, generator=random)
    sequences = len(bounds) - 1 if bounds else batch
    state, dstate = (torch.randn(sequences, rows, width, generator=random) for rows in (3, 2))
    state[:, 1] = state[:, 1].abs() + 0.5
    if kind == "large":
        k, state[:, 2] = 120.0 * torch.rand(k.shape, generator=random) - 60.0, 40.0 * state[:, 2]
    masks = {}
    if kind == "masked":
        state[:, :, ::3] = torch.tensor([0.0, 0.0, EMPTY])[:, None]
        masks["valid"] = torch.rand(batch, length, generator=random) < 0.7
        masks["reset_mask"] = torch.rand(batch, length, generator=random) < 0.15
    convert = (lambda t: t.to(place(device), wide)) if wide else (lambda t: t.to(place(device)))
    leaves = [banded(convert(t)).requires_grad_() for t in (k.to(dtype), v.to(dtype), w, u, state)]
    options = {name: mask.to(place(device)) for name, mask in masks.items()}
    options["cu_seqlens"] = torch.tensor(bounds, device=place(device)) if bounds else None
    return leaves, options, [convert(dy.to(dtype)), convert(dstate)]


def run(op, leaves, options, upstream):
    """Results and all gradients. Of a state, what does not depend on its scale: p / q and the logarithm of q e^o."""
    y, state = op(*leaves[:4], initial_state=leaves[4], **options)
    p, q, o = state.unbind(1)
    none = q == 0
    state = torch.stack([p / q.masked_fill(none, 1.0), (q.masked_fill(none, 1.0)).log() + o.masked_fill(none, 0.0)], 1)
    outputs = [(o, d) for o, d in zip((y, state), upstream) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in outputs], leaves, [d for _, d in outputs], materialize_grads=True)
    return y, state, *grads


def compare(shape, kind, dtype, device):
    results = run(wkv, *problem(shape, kind, dtype, device))
    expected = run(wkv_reference, *problem(shape, kind, dtype, device, torch.float64))
    assert [r.dtype for r in results] == [dtype, torch.float32, dtype, dtype, *[torch.float32] * 3]
    for name, got, want in zip(NAMES, results, expected):
        assert_close(name, got, want, RATIOS[dtype])


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_against_the_definition(device, shape, kind):
    if device == "interpreted" and shape != "T37" and (kind != "masked" or shape in ("T63", "T100")):
        pytest.skip("slow to interpret, and others cross chunks and sequences too")
    if kind == "large" and shape == "T1":
        pytest.skip("of one token so far from its past, gradients are nothing but e^-100")
    compare(shape, kind, torch.float32, device)


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(device, dtype):
    compare("T37", "masked", dtype, device)


@pytest.mark.usefixtures("poisoned")
@tiers
def test_exponents_beyond_all_range(device):
    """Logits around 1000 and -1000, decays e^-300, and a history far above or below them."""
    results = []
    for op, wide in ((wkv, None), (wkv_reference, torch.float64)):
        (k, v, w, u, state), options, upstream = problem("T37", "middle", torch.float32, device, wide)
        with torch.no_grad():
            k.add_(1000.0 * (v.abs() > 0.7) - 2000.0 * (v.abs() > 1.4))
            w[::3] -= 300.0
            state[:, 2, ::2] += 1500.0
            for x in (k, w, state):
                x.copy_(x.float())
        results.append(run(op, (k, v, w, u, state), options, upstream))
    for name, got, want in zip(NAMES, *results):
        assert_close(name, got, want, RATIOS[torch.float32])


GOLDEN = {  # time_decay -1, time_first 0.5; gradients of sum(y)
    "y": [1.0, -0.635149, -0.202394, 0.363793, 0.212859],
    "state": [0.356957, 1.577964, 1.632121],
    "dk": [0.547692, -1.141803, 0.410845, 0.288149, -0.104883],
    "dv": [1.414523, 1.729027, 0.196889, 1.432963, 0.226597],
    "dfirst": [0.040648],
    "ddecay": [0.030959],
}


def golden(device, dtype):
    numbers = [0.0, 1.0, -1.0, 2.0, 0.5], [1.0, -1.0, 2.0, 0.5, -0.25], [-1.0], [0.5]
    k, v, decay, first = (torch.tensor(x, dtype=dtype, device=place(device)) for x in numbers)
    return [x.requires_grad_() for x in (k.view(1, 5, 1), v.view(1, 5, 1), decay, first)]


@tiers
@pytest.mark.parametrize("op", [wkv, wkv_reference])
def test_golden_values(device, op):
    k, v, decay, first = golden(device, torch.float64 if device == "cpu" else torch.float32)
    y, state = op(k, v, -decay.exp(), first)
    grads = torch.autograd.grad(y.sum(), (k, v, first, decay))
    for (name, want), got in zip(GOLDEN.items(), (y, state, *grads)):
        assert (got.flatten().cpu() - torch.tensor(want)).abs().max() < 1e-6, name


def test_the_state_is_a_product_of_any_shape():
    """Tokens are elements (log decay, o, p, q) of a monoid: folded from the left and as a tree they give the state."""
    k, v, decay, _ = golden("cpu", torch.float64)
    one = torch.ones((), dtype=torch.float64)

    def compose(first, second):
        top = torch.maximum(first[1] + second[0], second[1])
        old, new = torch.exp(first[1] + second[0] - top), torch.exp(second[1] - top)
        return first[0] + second[0], top, first[2] * old + second[2] * new, first[3] * old + second[3] * new

    a, b, c, d, e = [(-decay[0].exp(), k_t, v_t, one) for k_t, v_t in zip(k.flatten(), v.flatten())]
    left = compose(compose(compose(compose(a, b), c), d), e)
    tree = compose(compose(a, b), compose(compose(c, d), e))
    assert_close("tree", torch.stack(tree), torch.stack(left), 1e-15)
    assert_close("values", torch.stack(left), torch.tensor([-1.839397, 1.632121, 0.356957, 1.577964]), 1e-6)
    state = wkv(k, v, -decay.exp(), decay)[1].flatten()
    assert_close("state", state, torch.stack([left[2], left[3], left[1]]), 1e-15)


@pytest.mark.parametrize("op", [wkv, wkv_reference])
@pytest.mark.parametrize(("shape", "kind"), [("T15", "masked"), ("packed-tiny", "middle")])
def test_gradcheck(op, shape, kind):
    leaves, options, _ = problem(shape, kind, torch.float32, "cpu", torch.float64)
    k, v, w, u, state = (leaf.detach()[..., :2].clone() for leaf in leaves)
    inputs = [x.requires_grad_() for x in (k, v, w, u, state[:, :2].clone())]

    def function(k, v, w, u, sums):
        y, final = op(k, v, w, u, initial_state=torch.cat([sums, state[:, 2:]], 1), **options)
        return y, final[:, :2] * final[:, 2:].detach().exp()

    assert torch.autograd.gradcheck(function, inputs)


@tiers
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_when_only_one_result_is_used(device, used):
    results = []
    for op, wide in ((wkv, None), (wkv_reference, torch.float64)):
        leaves, options, _ = problem("T15", "middle", torch.float32, device, wide)
        out = op(*leaves[:4], initial_state=leaves[4], **options)[used]
        results.append(torch.autograd.grad(out[:, :2].sum(), leaves, materialize_grads=True))
    for name, got, want in zip(NAMES[2:], *results):
        assert_close(name, got, want, 2e-6)


def test_steps_equal_the_sequence():
    (k, v, w, u, state), _, _ = problem("T37", "middle", torch.float32, "cpu", torch.float64)
    y, final = wkv(k, v, w, u, initial_state=state)
    for t in range(k.shape[1]):
        y_t, state = wkv_step(k[:, t], v[:, t], w, u, state)
        assert_close(f"y at {t}", y_t, y[:, t], 1e-13)
    assert_close("state", state, final, 1e-13)


@tiers
def test_pieces_equal_the_whole(device):
    """Outputs, last state and all gradients, with each piece given the state of the one before."""

    def pieces(k, v, w, u, initial_state, cu_seqlens):
        ys, state = [], initial_state
        for begin, end in ((0, 5), (5, 5), (5, 36), (36, 37)):
            y, state = wkv(k[:, begin:end], v[:, begin:end], w, u, initial_state=state, cu_seqlens=cu_seqlens)
            ys.append(y)
        return torch.cat(ys, 1), state

    wide = torch.float64 if device == "cpu" else None
    results = [run(op, *problem("T37", "large", torch.float32, device, wide)) for op in (pieces, wkv)]
    for name, got, want in zip(NAMES, *results):
        assert_close(name, got, want, 1e-12 if wide else 2e-6)


@tiers
def test_padding_is_as_good_as_absent(device):
    """Whatever it holds, and wherever it stands; at the end it leaves every bit of the state."""
    (k, v, w, u, state), _, (dy, _) = problem("T37", "middle", torch.float32, device)
    k, v = k.detach(), v.detach()
    real = torch.rand(k.shape[1], generator=torch.Generator().manual_seed(5)).to(k.device) < 0.6
    results = []
    for kept, valid in ((real, None), (slice(None), real[None])):
        k_, v_ = k.clone(), v.clone()
        k_[:, ~real], v_[:, ~real] = float("nan"), float("inf")
        k_, v_ = (x[:, kept].requires_grad_() for x in (k_, v_))
        y, final = wkv(k_, v_, w, u, initial_state=state, valid=valid)
        grads = torch.autograd.grad((y, final), (k_, v_, w, u, state), (dy[:, kept], torch.ones_like(final)))
        results.append((y, final, *grads))
    alone, padded = results
    for i in (0, 2, 3):
        assert (padded[i][:, ~real] == 0).all()
        assert_close(NAMES[i], padded[i][:, real], alone[i], 2e-6)
    for i in (1, 4, 5, 6):
        assert_close(NAMES[i], padded[i], alone[i], 2e-6)
    nothing = wkv(k, v, w, u, initial_state=state, valid=torch.zeros_like(real)[None])[1]
    assert torch.equal(nothing, state)


@tiers
def test_a_reset_drops_the_past_exactly(device):
    (k, v, w, u, state), _, _ = problem("T37", "middle", torch.float32, device)
    fresh = (torch.arange(37, device=k.device) == 23)[None]
    with torch.no_grad():
        v[:, :23] = 1e30
        y, final = wkv(k, v, w, u, initial_state=state, reset_mask=fresh)
        alone, alone_final = wkv(k[:, 23:], v[:, 23:], w, u)
    assert_close("y", y[:, 23:], alone, 1e-6)
    assert_close("state", final, alone_final, 1e-6)


@tiers
def test_what_the_backward_pass_keeps(device):
    """Beside the inputs at most a sixteenth of the states."""
    batch, length, width = 1, 64 if device == "interpreted" else 512, 8
    leaves = [torch.randn(batch, length, width, device=place(device), requires_grad=True) for _ in range(2)]
    leaves += [x.detach()[0, 0].neg().abs().neg().requires_grad_() for x in leaves]
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y, _ = wkv(*leaves)
    states = sum(size for pointer, size in saved.items() if pointer not in {x.data_ptr() for x in leaves})
    assert 0 < states <= batch * length * width * 3 * 4 / 16
    torch.autograd.grad(y.sum(), leaves)
    with torch.no_grad():
        assert chunked_wkv(*leaves, torch.zeros(batch, 3, width, device=y.device), None, None, False)[2].numel() == 0


@tiers
def test_layout_in_memory_does_not_matter(device):
    (k, v, w, u, state), options, (dy, _) = problem("packed-tiny", "masked", torch.float32, device)
    turned = [x.mT.contiguous().mT for x in (k, v)]
    turned_state = state.detach().mT.contiguous().mT
    y, _ = wkv(k, v, w, u, initial_state=state, **options)
    again, _ = wkv(*turned, w, u, initial_state=turned_state, **options)
    assert torch.equal(y, again)
    plain, crooked = (torch.autograd.grad(y, k, d, retain_graph=True)[0] for d in (dy, dy.mT.contiguous().mT))
    assert torch.equal(plain, crooked)


@tiers
def test_opcheck(device):
    leaves, options, _ = problem("packed-tiny", "masked", torch.float32, device)
    marks = (~options["valid"]).to(torch.uint8) + 2 * options["reset_mask"].to(torch.uint8)
    torch.library.opcheck(chunked_wkv, (*leaves, options["cu_seqlens"], marks, True))


@pytest.mark.parametrize(("shape", "kind"), [("T37", "masked"), ("packed", "middle")])
def test_torch_compile_without_a_graph_break(shape, kind):
    case = problem(shape, kind, torch.float32, "cpu")
    compiled = torch.compile(wkv, fullgraph=True, backend="aot_eager")
    got, expected = (run(op, *case) for op in (compiled, wkv))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.ones(6, 4)}, r"wkv: k must be \[B, T, C\], got \(6, 4\)"),
        ({"v": torch.ones(1, 6, 1)}, r"wkv: v must be \[1, 6, 4\] like k, got \(1, 6, 1\)"),
        ({"k": torch.ones(1, 6, 4).long()}, "wkv: k must be a floating-point tensor"),
        ({"w": torch.ones(1, 1, 4)}, r"wkv: w must be \[C\] = \[4\], got \(1, 1, 4\)"),
        ({"u": torch.ones(5)}, r"wkv: u must be \[C\] = \[4\], got \(5,\)"),
        ({"initial_state": torch.ones(1, 4)}, r"wkv: initial_state must be \[N, 3, C\] = \[1, 3, 4\], got \(1, 4\)"),
        ({"valid": torch.ones(1, 6)}, r"wkv: valid must be bool \[B, T\] = \[1, 6\], got \(1, 6\) torch.float32"),
        ({"reset_mask": torch.ones(6).bool()}, r"wkv: reset_mask must be bool \[B, T\] = \[1, 6\], got \(6,\)"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "wkv: cu_seqlens must be rising from 0 to T = 6"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    right = {"k": torch.ones(1, 6, 4), "v": torch.ones(1, 6, 4), "w": -torch.ones(4), "u": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        wkv(**{**right, **changes})
