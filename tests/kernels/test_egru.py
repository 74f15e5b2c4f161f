"""The event-based GRU: every path against the definition, golden values, states, padding, packing, errors."""

import math

import pytest
import torch
from kernel_cases import RATIOS, TIERS, assert_close, banded, place

from spikelm.kernels import egru_cpp, egru_reference
from spikelm.kernels.egru import FORMS, egru, egru_step, event_gru
from spikelm.kernels.egru_torch import Cell, EventCell

# The CPU has two paths; those who ask for "cpu" get the one in torch.
paths = pytest.mark.parametrize(
    "device", ["cpu", "cpp", *(pytest.param(x, marks=TIERS[x]) for x in ("interpreted", "gpu"))], indirect=True
)
forms = pytest.mark.parametrize("form", FORMS)
# B, T, heads, D, bounds of packed sequences
SHAPES = {
    "one": (1, 1, 1, 1, ()),
    "T15": (2, 15, 2, 5, ()),
    "T37": (5, 37, 2, 33, ()),
    "T63": (1, 63, 1, 20, ()),
    "T100": (3, 100, 2, 16, ()),
    "rows": (19, 7, 1, 8, ()),
    "packed": (1, 40, 2, 5, (0, 0, 7, 7, 8, 40, 40)),
    "empty": (2, 0, 2, 4, ()),
    "no-rows": (0, 5, 2, 4, ()),
    "empty-packed": (1, 0, 1, 4, (0, 0)),
}
NAMES = ("y", "state", "da", "dweight", "dthreshold", "dstate", "dbias")
# How near a state may come to its threshold in a test that rounds: then no rounding makes or loses an event.
MARGIN = 1e-5


@pytest.fixture
def device(request, monkeypatch):
    """The tier, with the CPU's C++ path on or off."""
    if request.param == "cpp" and not egru_cpp.available():
        pytest.skip("needs a C++ compiler")
    if request.param == "cpu":
        monkeypatch.setattr(egru_cpp, "available", lambda: False)
    return "cpu" if request.param == "cpp" else request.param


@pytest.fixture
def distances(monkeypatch):
    """How near the states of the definition came to their thresholds."""
    least, apply = [], egru_reference.Event.apply

    def record(v, *shape):
        least.extend(v.detach().abs().flatten(1).amin(1).tolist())
        return apply(v, *shape)

    monkeypatch.setattr(egru_reference.Event, "apply", record)
    return least


def problem(shape, form, device="cpu", dtype=torch.float32, wide=None, zoneout=None, masked=False):
    """Leaves, further arguments, gradients of the results; `wide`: the same numbers in that dtype."""
    batch, length, heads, width, bounds = SHAPES[shape]
    random = torch.Generator().manual_seed(length + 23)
    sequences, channels = len(bounds) - 1 if bounds else batch, heads * width

    def draw(*size):
        return torch.randn(*size, generator=random)

    a, dy = draw(batch, length, 3 * channels).to(dtype), draw(batch, length, channels).to(dtype)
    weight = (draw(heads, width, 3 * width) * width**-0.5).to(torch.float32 if dtype is torch.float16 else dtype)
    threshold, state, dstate = 0.3 * draw(channels).abs(), draw(sequences, 2, channels), draw(sequences, 2, channels)
    leaves = [a, weight, threshold, state, *([draw(3 * channels)] if form == "evnn" else [])]
    mask = torch.rand(batch, length, channels, generator=random) < 0.7
    valid, reset_mask = (torch.rand(batch, length, generator=random) < p for p in (0.7, 0.15))
    convert = (lambda x: x.to(place(device), wide)) if wide else (lambda x: x.to(place(device)))
    kwargs = {"form": form, "dampening": 0.9, "support": 1.3, "zoneout": zoneout}
    if zoneout == "mask":
        kwargs["zoneout"] = mask.to(place(device))
    if masked:
        kwargs |= {"valid": valid.to(place(device)), "reset_mask": reset_mask.to(place(device))}
    if bounds:
        kwargs["cu_seqlens"] = torch.tensor(bounds, device=place(device))
    return [banded(convert(x)).requires_grad_() for x in leaves], kwargs, [convert(x) for x in (dy, dstate)]


def call(op, leaves, kwargs):
    bias = leaves[4] if len(leaves) > 4 else None
    return op(*leaves[:3], initial_state=leaves[3], bias=bias, **kwargs)


def run(op, leaves, kwargs, upstream):
    results = call(op, leaves, kwargs)
    wanted = [(x, dx) for x, dx in zip(results, upstream) if x.requires_grad]  # the definition of nothing has no graph
    outputs, grads = zip(*wanted)
    return *results, *torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)


def compare(ratio, *arguments, distances, **choices):
    """Results and gradients against the float64 definition, events exactly."""
    results = run(egru, *problem(*arguments, **choices))
    expected = run(egru_reference.egru_reference, *problem(*arguments, wide=torch.float64, **choices))
    if ratio > RATIOS[torch.float64] * 10:
        assert min(distances, default=1.0) > MARGIN, "a state meets its threshold: draw other numbers"
    assert torch.equal(results[0] != 0, expected[0] != 0)
    for name, got, want in zip(NAMES, results, expected):
        assert_close(name, got, want, ratio)
    return results


@pytest.mark.usefixtures("poisoned")
@paths
@forms
@pytest.mark.parametrize(
    ("shape", "zoneout", "masked"),
    [
        ("one", None, False),
        ("T15", None, True),
        ("T15", "mask", True),
        ("T37", None, False),
        ("T37", 0.3, True),
        ("T63", "mask", False),
        ("T100", None, False),
        ("rows", "mask", False),
        ("packed", "mask", True),
        ("packed", 0.3, False),
        ("empty", None, True),
        ("no-rows", None, False),
        ("empty-packed", None, False),
    ],
)
def test_every_path_against_the_definition(device, form, shape, zoneout, masked, distances):
    if device == "interpreted" and (shape in ("T37", "T63", "T100") or (shape == "packed" and not masked)):
        pytest.skip("slow to interpret, and others cross tiles and sequences too")
    compare(2e-6, shape, form, device, zoneout=zoneout, masked=masked, distances=distances)


@forms
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("zoneout", [None, 0.3, "mask"])
@pytest.mark.parametrize("shape", ["T15", "T37", "packed"])
def test_in_float64_events_are_exact_and_gradients_those_of_autograd(form, shape, zoneout, masked, distances):
    arguments = {"dtype": torch.float64, "zoneout": zoneout, "masked": masked}
    results = run(egru, *problem(shape, form, wide=torch.float64, **arguments))
    expected = run(egru_reference.egru_reference, *problem(shape, form, wide=torch.float64, **arguments))
    assert torch.equal(results[0] != 0, expected[0] != 0) and (results[0] != 0).any() and (results[0] == 0).any()
    for name, got, want in zip(NAMES, results, expected):
        assert_close(name, got, want, 1e-12)


@pytest.mark.usefixtures("poisoned")
@paths
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(device, form, dtype, distances):
    results = compare(RATIOS[dtype], "T15", form, device, dtype=dtype, masked=True, distances=distances)
    weight = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    assert [r.dtype for r in results[:6]] == [dtype, torch.float32, dtype, weight, torch.float32, torch.float32]


def test_golden_values():
    def matrix(n, m, k):
        rows = [[0.2 * (((7 * i + 3 * j + k) % 11) - 5) for j in range(m)] for i in range(n)]
        return torch.tensor(rows, dtype=torch.float64)

    w, r, b, d = matrix(2, 9, 1), matrix(3, 9, 4), 0.05 * matrix(1, 9, 2)[0], 0.05 * matrix(1, 9, 5)[0]
    threshold = torch.tensor([0.05, 0.10, 0.15], dtype=torch.float64)
    x = torch.tensor([[[0.5, -1.0], [1.0, 0.25], [-0.75, 0.5], [0.25, 1.0]]], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (threshold, w, r, d, x)]
    y, state = egru(x @ w + b, r, threshold, form="evnn", bias=d)
    expected = [
        [0.350720911, 0.0, 0.0],
        [0.308511192, 0.0, 0.0],
        [0.0, 0.133601852, 0.270537200],
        [0.0, 0.165548951, 0.494042373],
    ]
    after = [
        [0.300720911, -0.208334165, -0.298785171],
        [0.258511192, -0.523390673, -0.234281257],
        [0.011014548, 0.033601852, 0.120537200],
        [-0.021997657, 0.065548951, 0.344042373],
    ]
    near = {"rtol": 0.0, "atol": 6e-10}
    torch.testing.assert_close(y[0], torch.tensor(expected, dtype=torch.float64), **near)
    for t in range(4):
        _, state_t = egru((x @ w + b)[:, : t + 1], r, threshold, form="evnn", bias=d)
        torch.testing.assert_close(state_t[0], torch.tensor([after[t], expected[t]], dtype=torch.float64), **near)
    assert torch.equal(state_t, state)
    dthreshold, dw, dr, dd, dx = torch.autograd.grad(y.sum(), leaves)
    golden = torch.tensor([-0.278653324, -0.229547488, -0.554243664], dtype=torch.float64)
    torch.testing.assert_close(dthreshold, golden, **near)
    sums = torch.tensor([1.498881698, 0.175778774, 0.758138915], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([dw.sum(), dr.sum(), dd.sum()]), sums, **near)
    golden = torch.tensor([[0.452303653, -0.199382240], [-0.949110987, 0.772386623]], dtype=torch.float64)
    torch.testing.assert_close(dx[0, [0, 3]], golden, **near)


def test_the_papers_form_in_plain_numbers():
    """c_t = u z + (1 - u) c_{t-1} - y_{t-1} and y_t = c_t H(c_t - threshold), unit by unit, without a tensor."""
    (a, weight, threshold, state), _, _ = problem("T15", "paper", wide=torch.float64)
    y, final = egru(a, weight, threshold, form="paper", initial_state=state)
    heads, width = weight.shape[:2]

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    for b in range(a.shape[0]):
        for h in range(heads):
            units = range(h * width, (h + 1) * width)
            c, event = ([state[b, i, n].item() for n in units] for i in range(2))
            w = weight[h].tolist()
            for t in range(a.shape[1]):
                a_t = a[b, t].view(heads, 3, width)[h].tolist()
                u, r = (
                    [
                        sigmoid(a_t[i][n] + sum(e * w[k][i * width + n] for k, e in enumerate(event)))
                        for n in range(width)
                    ]
                    for i in range(2)
                )
                seen = [r_n * e for r_n, e in zip(r, event)]
                sums = [sum(s * w[k][2 * width + n] for k, s in enumerate(seen)) for n in range(width)]
                z = [math.tanh(a_t[2][n] + sums[n]) for n in range(width)]
                c = [u[n] * z[n] + (1 - u[n]) * c[n] - event[n] for n in range(width)]
                event = [c[n] if c[n] > threshold[h * width + n] else 0.0 for n in range(width)]
                assert y[b, t, units.start : units.stop].tolist() == pytest.approx(event, abs=1e-12)
            assert final[b, :, units.start : units.stop].tolist() == [pytest.approx(c), pytest.approx(event)]


@paths
@forms
def test_at_its_threshold_a_unit_is_silent(device, form):
    a = torch.randn(2, 1, 24, device=place(device))
    weight, zero = torch.zeros(1, 8, 24, device=place(device)), torch.zeros(8, device=place(device))
    _, state = egru(a, weight, zero, form=form)  # without a threshold, c is the state itself
    for n in range(2):
        p = state[n, 0].clamp(min=0.0)
        y, final = egru(a[n : n + 1], weight, p, form=form)
        assert (p > 0).any() and not y.any()
        assert torch.equal(final[0, 0], state[n, 0]) and not final[0, 1].any()
        assert torch.equal(egru(a[n : n + 1], weight, p * (1 - 1e-6), form=form)[0][0, 0] != 0, p > 0)


@paths
@forms
def test_pieces_and_steps_equal_the_sequence(device, form, distances):
    leaves, kwargs, _ = problem("T15", form, device, zoneout=0.2)
    y, final = call(egru, leaves, kwargs)
    a, state = leaves[0], leaves[3]
    middle, bias = state, leaves[4] if form == "evnn" else None
    pieces = []
    for piece in a.split(6, 1):
        part, middle = call(egru, [piece, *leaves[1:3], middle, *leaves[4:]], kwargs)
        pieces.append(part)
    assert_close("y", torch.cat(pieces, 1), y, 2e-6)
    assert_close("state", middle, final, 2e-6)
    call(egru_reference.egru_reference, *problem("T15", form, device, wide=torch.float64, zoneout=0.2)[:2])
    assert min(distances) > MARGIN
    for t in range(a.shape[1]):
        y_t, state = egru_step(a[:, t], *leaves[1:3], state, form=form, bias=bias, zoneout=0.2)
        assert_close(f"y at {t}", y_t, y[:, t], 2e-6)
    assert_close("state", state, final, 2e-6)


@paths
@forms
def test_padding_keeps_the_states_as_they_are(device, form):
    leaves, kwargs, _ = problem("T15", form, device)
    state = leaves[3].detach()
    nothing = torch.zeros(2, 15, dtype=torch.bool, device=place(device))
    y, final = call(egru, leaves, kwargs | {"valid": nothing})
    assert torch.equal(final, state) and not y.any()
    valid = nothing.clone()
    valid[0, 4:] = valid[1, :9] = True  # left and right
    y, final = call(egru, leaves, kwargs | {"valid": valid})
    for row, kept in ((0, slice(4, None)), (1, slice(9))):
        mine = [leaves[0][row : row + 1, kept], *leaves[1:3], state[row : row + 1], *leaves[4:]]
        alone, end = call(egru, mine, kwargs)
        assert_close("y", y[row : row + 1, kept], alone, 2e-6)
        assert_close("state", final[row : row + 1], end, 2e-6)
    assert not y[~valid].any()
    everywhere = call(egru, leaves, kwargs | {"valid": nothing, "reset_mask": ~nothing})[1]
    assert not everywhere.any()


@paths
@forms
def test_a_reset_starts_anew(device, form, distances):
    leaves, kwargs, _ = problem("T15", form, device)
    reset_mask = torch.zeros(2, 15, dtype=torch.bool, device=place(device))
    reset_mask[:, 6] = True
    y, final = call(egru, leaves, kwargs | {"reset_mask": reset_mask})
    anew = [leaves[0][:, 6:], *leaves[1:3], torch.zeros_like(leaves[3]), *leaves[4:]]
    alone, end = call(egru, anew, kwargs)
    call(egru_reference.egru_reference, [x.double() for x in anew], kwargs)
    assert min(distances) > MARGIN
    assert_close("y", y[:, 6:], alone, 2e-6)
    assert_close("state", final, end, 2e-6)
    assert not torch.autograd.grad(final.sum() + y[:, 6:].sum(), leaves[3])[0].any()


@forms
def test_heads_are_a_block_diagonal_matrix(form):
    leaves, kwargs, _ = problem("T15", form, wide=torch.float64)
    heads, width = leaves[1].shape[:2]
    full = torch.zeros(heads * width, 3, heads * width, dtype=torch.float64)
    for h in range(heads):
        block = slice(h * width, (h + 1) * width)
        full[block, :, block] = leaves[1][h].unflatten(1, (3, width))

    def by_block(x):
        return x.unflatten(-1, (heads, 3, width)).transpose(-2, -3).flatten(-3)

    alike = [by_block(leaves[0]), full.flatten(1), *leaves[2:4], *map(by_block, leaves[4:])]
    for got, want in zip(call(egru, alike, kwargs), call(egru, leaves, kwargs)):
        assert_close("full", got, want, 1e-13)


def test_zoneout():
    leaves, kwargs, _ = problem("T15", "evnn", wide=torch.float64)
    shape = (*leaves[0].shape[:2], leaves[3].shape[2])
    plain = call(egru, leaves, kwargs)
    for mask in (torch.ones(shape), torch.ones(shape, dtype=torch.bool), 0.0):
        assert all(torch.equal(x, y) for x, y in zip(call(egru, leaves, kwargs | {"zoneout": mask}), plain))
    same = (call(egru, leaves, kwargs | {"zoneout": x})[1] for x in (torch.full(shape, 0.75), 0.25))
    assert torch.equal(*same)
    # With nothing new, a state only loses its events; below the threshold it stays as it is.
    state = leaves[3].detach().clone()
    state[:, 0] = -state[:, 0].abs()
    _, final = call(egru, [*leaves[:3], state, *leaves[4:]], kwargs | {"zoneout": torch.zeros(shape)})
    assert torch.equal(final[:, 0], state[:, 0]) and not final[:, 1].any()


@paths
@forms
def test_the_backward_pass_keeps_one_tensor(device, form):
    leaves, kwargs, _ = problem("T37", form, device)
    saved = {}

    def keep(x):
        saved[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y, _ = call(egru, leaves, kwargs)
    assert sum(saved.values()) - sum(saved.get(x.data_ptr(), 0) for x in leaves) == 4 * y.numel()


@paths
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_when_only_one_result_is_used(device, used, distances):
    grads = []
    for op, wide in ((egru, None), (egru_reference.egru_reference, torch.float64)):
        leaves, kwargs, _ = problem("T15", "evnn", device, wide=wide)
        grads.append(torch.autograd.grad(call(op, leaves, kwargs)[used].sum(), leaves))
    assert min(distances) > MARGIN
    for got, want in zip(*grads):
        assert_close("gradient", got, want, 2e-6)


@paths
@forms
def test_layout_in_memory_does_not_matter(device, form):
    leaves, kwargs, upstream = problem("T15", form, device)
    crooked = [x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach() for x in leaves]
    turned = [x.requires_grad_() for x in crooked], kwargs, [x.mT.contiguous().mT for x in upstream]
    assert all(torch.equal(x, y) for x, y in zip(run(egru, leaves, kwargs, upstream), run(egru, *turned)))


@paths
@forms
def test_autocast_leaves_the_arithmetic_as_it_is(device, form):
    leaves, kwargs, upstream = problem("T15", form, device)
    options = {"form": form, "bias": leaves[4] if form == "evnn" else None}
    plain = run(egru, leaves, kwargs, upstream)
    step = egru_step(leaves[0][:, 0], *leaves[1:4], **options)
    with torch.autocast(place(device).type, dtype=torch.bfloat16):
        cast = run(egru, leaves, kwargs, upstream)
        cast_step = egru_step(leaves[0][:, 0], *leaves[1:4], **options)
    assert all(torch.equal(x, y) for x, y in zip((*cast, *cast_step), (*plain, *step)))


@pytest.mark.parametrize("device", ["cpp"], indirect=True)
@forms
def test_threads_do_not_change_sums(device, form):
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(egru, *problem("rows", form, masked=True)))
    assert all(torch.equal(x, y) for x, y in zip(*results))


@paths
def test_a_head_too_wide_for_the_kernels(device):
    a, weight, threshold = (torch.randn(x, device=place(device)) for x in ((1, 2, 195), (1, 65, 195), (65,)))
    results = [f(a, weight / 8, threshold.abs(), form="evnn")[1] for f in (egru, egru_reference.egru_reference)]
    assert_close("state", *results, 2e-6)


@paths
@forms
@pytest.mark.parametrize("shape", ["T15", "packed"])
def test_opcheck(device, form, shape):
    leaves, kwargs, _ = problem(shape, form, device, masked=shape == "T15", zoneout="mask")
    (a, weight, threshold, state), bias = leaves[:4], leaves[4] if form == "evnn" else None
    masks = (kwargs["zoneout"], *(kwargs.get(name) for name in ("valid", "reset_mask", "cu_seqlens")))
    options = form == "evnn", 1.0, 0.7, 1.0, True
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(event_gru, (a, weight, threshold, bias, state, *masks, *options), test_utils=checks)


@pytest.mark.parametrize("shape", ["T15", "packed"])
@forms
def test_torch_compile_without_a_graph_break(shape, form):
    arguments = problem(shape, form, masked=True)
    compiled = torch.compile(egru, fullgraph=True, backend="aot_eager")
    got, expected = (run(op, *arguments) for op in (compiled, egru))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.ones(6, 12)}, r"egru: a must be \[B, T, 3H\] with H = 4, got \(6, 12\)"),
        ({"a": torch.ones(1, 6, 12).long()}, "egru: a must be a floating-point tensor"),
        ({"weight": torch.ones(2, 2, 4)}, r"egru: weight must be \[heads, D, 3D\] or \[H, 3H\], got \(2, 2, 4\)"),
        ({"threshold": torch.ones(1)}, r"egru: threshold must be \[4\], got \(1,\)"),
        ({"bias": torch.ones(4)}, r"egru: bias must be \[12\], got \(4,\)"),
        ({"form": "gru"}, r"egru: form must be one of \('evnn', 'paper'\), got 'gru'"),
        ({"form": "paper", "bias": torch.ones(12)}, "egru: bias must be None with form='paper'"),
        ({"support": 0.0}, "egru: support must be a number > 0, got 0.0"),
        ({"zoneout": 1.5}, r"egru: zoneout must be a probability in \[0, 1\], got 1.5"),
        ({"zoneout": torch.ones(1, 6, 1)}, r"egru: zoneout must be a mask \[1, 6, 4\], got \(1, 6, 1\)"),
        ({"initial_state": torch.ones(1, 4)}, r"egru: initial_state must be \[N, 2, H\] = \[1, 2, 4\], got \(1, 4\)"),
        ({"valid": torch.ones(1, 6)}, r"egru: valid must be bool \[1, 6\], got torch.float32 \(1, 6\)"),
        ({"reset_mask": torch.ones(6, dtype=torch.bool)}, r"egru: reset_mask must be bool \[1, 6\], got .* \(6,\)"),
        ({"cu_seqlens": torch.tensor([0, 7])}, "egru: cu_seqlens must be rising from 0 to T = 6"),
        ({"a": torch.ones(2, 6, 12), "cu_seqlens": torch.tensor([0, 6])}, "egru: the batch size must be 1"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    right = {"a": torch.ones(1, 6, 12), "weight": torch.ones(2, 2, 6), "threshold": torch.ones(4), "form": "evnn"}
    with pytest.raises(ValueError, match=message):
        egru(**{**right, **changes})


def test_a_wrong_state_of_a_step_is_named():
    with pytest.raises(ValueError, match=r"egru_step: state must be \[B, 2, H\] = \[3, 2, 4\], got \(3, 4\)"):
        egru_step(torch.ones(3, 12), torch.ones(4, 12), torch.ones(4), torch.ones(3, 4), form="evnn")


@pytest.mark.parametrize("active", [0, 1, 3, 12])
def test_a_cell_that_reads_events_only_gives_the_same(active):
    torch.manual_seed(0)
    weight, bias = torch.randn(1, 12, 36, dtype=torch.float64), torch.randn(36, dtype=torch.float64)
    y = torch.zeros(1, 2, 12, dtype=torch.float64)
    y[:, :, :active] = torch.rand(1, 2, active, dtype=torch.float64)
    cells = (kind.of(weight, bias, torch.zeros(12, dtype=torch.float64), True) for kind in (Cell, EventCell))
    dense, events = (cell.recur(y) for cell in cells)
    torch.testing.assert_close(events, dense, rtol=0, atol=1e-12)
