"""Integrate-and-fire units: every path against the definition, golden values, states, packing, gradients in time."""

import itertools

import pytest
import torch

from spikelm.kernels import lif as module
from spikelm.kernels.lif import GAINS, RESETS, SURROGATES, Astrocyte, lif, lif_step
from spikelm.kernels.lif_reference import lif_reference, surrogate_primal
from spikelm.kernels.runtime import use_triton

TIERS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cpu", id="interpreted", marks=pytest.mark.interpret),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
tiers = pytest.mark.parametrize("device", TIERS)
HISTORIES = {"full": ("full", None), "none": ("none", None), "pieces": ("truncated", 3)}
LAYOUTS = ("batch", "packed")


def definition(x, decay, threshold, **kwargs):
    """`lif` with the reference in place of the op."""
    astrocyte, cu_seqlens = kwargs.get("astrocyte"), kwargs.get("cu_seqlens")
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    params = module._stack_params(x, decay, threshold, astrocyte)
    state = module._initial_state(x, kwargs.get("initial_state"), sequences, astrocyte is not None)
    spikes, final = lif_reference(
        x,
        params,
        state,
        cu_seqlens,
        kwargs.get("reset_mask"),
        kwargs.get("reset", "hard"),
        kwargs.get("detach_reset", False),
        kwargs.get("surrogate", "atan"),
        kwargs.get("width", 1.0),
        kwargs.get("gain", "euler") == "euler",
        module._window(kwargs.get("temporal_grad", "full"), kwargs.get("window")),
    )
    return spikes, final if astrocyte is not None else final[:, 0]


def problem(layout, astro, dtype, masked=False, channels=5, seed=0):
    """Random arguments: (x, decay, threshold, keyword arguments, tensors that want gradients), all on the CPU."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*shape, scale=1.0, shift=0.0):
        return (torch.rand(*shape, generator=g, dtype=wide) * scale + shift).requires_grad_()

    batch, time, cu_seqlens = (3, 9, None) if layout == "batch" else (1, 13, torch.tensor([0, 4, 4, 5, 13, 13]))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    x = (torch.randn(batch, time, channels, generator=g, dtype=wide) * 2.0).to(dtype).requires_grad_()
    decay, threshold = draw(channels), draw(channels, shift=0.2)
    slow = Astrocyte(
        draw(channels), draw(channels), draw(channels, scale=4.0), draw(channels, scale=0.5), draw(channels, scale=0.5)
    )
    shape = (sequences, 3, channels) if astro else (sequences, channels)
    state = torch.randn(shape, generator=g, dtype=wide).requires_grad_()
    kwargs = {"initial_state": state, "cu_seqlens": cu_seqlens, "astrocyte": slow if astro else None}
    if masked:
        kwargs["reset_mask"] = torch.rand(batch, time, generator=g) < 0.3
    return x, decay, threshold, kwargs, [x, decay, threshold, state, *(slow if astro else ())]


def compare(device, layout, astro, dtype, masked, channels=5, **choices):
    """Outputs and all gradients of `lif` on `device` against the definition on the CPU."""
    x, decay, threshold, kwargs, leaves = problem(layout, astro, dtype, masked, channels)
    expected = definition(x, decay, threshold, **kwargs, **choices)
    g = torch.Generator().manual_seed(1)
    ds = torch.randn(expected[0].shape, generator=g).to(dtype)
    dv = torch.randn(expected[1].shape, generator=g).to(expected[1].dtype)
    wanted = torch.autograd.grad(expected, leaves, (ds, dv), materialize_grads=True)

    moved = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    there = dict(zip(leaves, moved))
    kwargs["initial_state"] = there[kwargs["initial_state"]]
    if astro:
        kwargs["astrocyte"] = Astrocyte(*moved[4:])
    for name in ("cu_seqlens", "reset_mask"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name].to(device)
    got = lif(*moved[:3], **kwargs, **choices)
    assert got[0].dtype is dtype and got[1].dtype is expected[1].dtype
    assert torch.equal(got[0].cpu(), expected[0])
    exact = dtype is torch.float64
    if astro:  # tanh differs by rounding between libraries, so the state does too
        torch.testing.assert_close(
            got[1].cpu(), expected[1], rtol=1e-12 if exact else 1e-5, atol=1e-12 if exact else 1e-5
        )
    else:
        assert torch.equal(got[1].cpu(), expected[1])
    grads = torch.autograd.grad(got, moved, (ds.to(device), dv.to(device)))
    narrow = dtype in (torch.bfloat16, torch.float16)
    rtol, atol = (1e-9, 1e-10) if exact else (1e-2, 1e-3) if narrow else (1e-4, 1e-5)
    for name, a, b in zip(("x", "decay", "threshold", "state", *Astrocyte._fields), grads, wanted):
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("astro", [False, True], ids=["lif", "astro"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("reset", RESETS)
def test_float64_against_autograd(astro, layout, masked, history, reset):
    temporal_grad, window = HISTORIES[history]
    for surrogate, (gain, detach) in zip(SURROGATES, itertools.product(GAINS, (False, True))):
        choices = {"reset": reset, "surrogate": surrogate, "gain": gain, "detach_reset": detach, "width": 0.7}
        compare("cpu", layout, astro, torch.float64, masked, temporal_grad=temporal_grad, window=window, **choices)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("elements", [1, 12, 40])
def test_pieces_of_time_join_without_a_seam(monkeypatch, layout, reset, elements):
    """The loops work on pieces that fit the cache; here every piece is a few steps long."""
    from spikelm.kernels import lif_cpu

    monkeypatch.setattr(lif_cpu, "_CACHED_ELEMENTS", elements)
    for masked, (temporal_grad, window) in itertools.product((False, True), HISTORIES.values()):
        choices = {"reset": reset, "temporal_grad": temporal_grad, "window": window}
        compare("cpu", layout, False, torch.float64, masked, **choices)


CASES = [
    # layout, astrocyte, mask, history, reset, detached, surrogate, gain, channels
    ("batch", False, False, "full", "hard", False, "atan", "euler", 5),
    ("batch", False, True, "full", "soft", False, "triangle", "additive", 5),
    ("batch", False, False, "pieces", "none", False, "sigmoid", "euler", 70),
    ("packed", False, False, "full", "hard", True, "rectangle", "euler", 5),
    ("packed", False, True, "pieces", "soft", True, "atan", "euler", 5),
    ("packed", False, False, "none", "hard", False, "atan", "additive", 64),
    ("batch", True, False, "full", "hard", False, "atan", "euler", 5),
    ("batch", True, True, "pieces", "soft", False, "sigmoid", "additive", 5),
    ("packed", True, True, "full", "hard", True, "triangle", "euler", 5),
    ("packed", True, False, "none", "none", False, "rectangle", "euler", 70),
]


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_every_path_against_the_definition(device, dtype, case):
    layout, astro, masked, history, reset, detach, surrogate, gain, channels = case
    if dtype is not torch.float32 and channels > 5:
        pytest.skip("one width is enough for the narrow types")
    temporal_grad, window = HISTORIES[history]
    choices = {"reset": reset, "detach_reset": detach, "surrogate": surrogate, "gain": gain}
    compare(device, layout, astro, dtype, masked, channels, temporal_grad=temporal_grad, window=window, **choices)


@tiers
@pytest.mark.parametrize("detached", [False, True])
def test_golden_spikegpt_unit(device, detached):
    """tau 2, threshold 1, hard reset, atan with alpha 2: values from finite differences of the equations."""
    if device == "cpu" and use_triton(torch.ones(1)):
        dtype, rtol = torch.float32, 1e-5
    else:
        dtype, rtol = torch.float64, 1e-5
    x = torch.tensor([1, 2, 3, 0.5, 2.5, 1.9], dtype=dtype, device=device)[None, :, None].requires_grad_()
    spikes, final = lif(x, 0.5, 1.0, detach_reset=detached)
    assert spikes.flatten().tolist() == [0, 1, 1, 0, 1, 0] and final.item() == pytest.approx(0.95, rel=1e-6)
    expected = [0.256590, 0.262654, 0.120526, 0.109452, 0.068900, 0.487960]
    if detached:
        expected = [0.298822, 0.309243, 0.144200, 0.181011, 0.209388, 0.487960]
    spikes.sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx(expected, rel=rtol)


def test_golden_astrocyte():
    x = torch.tensor([1, 2, 3, 0.5, 2.5, 1.9, 3, 3], dtype=torch.float64)[None, :, None].requires_grad_()
    unit = Astrocyte(0.9, 0.8, 4.0, 0.5, 0.2)
    assert lif(x, 0.5, 1.0, astrocyte=unit)[0].flatten().tolist() == [0, 1, 1, 0, 1, 0, 1, 1]
    params, state = module._stack_params(x, 0.5, 1.0, unit), x.new_zeros(1, 3, 1)
    _, _, history = module._lif(x, params, state, None, None, "hard", False, "atan", 1.0, True, 0, True)
    expected = [0.5, 1.25, 1.523949, 0.260635, 1.455336, 1.030286, 2.163821, 1.677316]
    assert history[0].flatten().tolist() == pytest.approx(expected, abs=1e-6)
    level = 1.0 + 0.5 * torch.tanh(4.0 * history[2])
    expected = [1, 1, 1.039915, 1.106351, 1.150037, 1.211278, 1.247797, 1.295527]
    assert level.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@tiers
@pytest.mark.parametrize("reset", RESETS)
def test_astrocyte_without_gains_is_lif(device, reset):
    x = (torch.randn(2, 12, 6) * 2).to(device).requires_grad_()
    idle = Astrocyte(0.9, 0.8, 4.0, 0.0, 0.0)
    spikes, final = lif(x, 0.6, 0.7, astrocyte=idle, reset=reset)
    plain, plain_final = lif(x, 0.6, 0.7, reset=reset)
    assert torch.equal(spikes, plain) and torch.equal(final[:, 0], plain_final)
    ds = torch.randn(2, 12, 6, device=device)
    torch.testing.assert_close(torch.autograd.grad(spikes, x, ds)[0], torch.autograd.grad(plain, x, ds)[0])


def test_a_busy_astrocyte_calms_its_unit():
    x = torch.full((1, 200, 1), 2.0)
    calm = Astrocyte(0.9, 0.9, 8.0, 0.9, 0.0)
    assert lif(x, 0.5, 1.0, astrocyte=calm)[0].mean() < lif(x, 0.5, 1.0)[0].mean()


@tiers
@pytest.mark.parametrize("astro", [False, True], ids=["lif", "astro"])
def test_steps_pieces_and_packing_agree_bit_for_bit(device, astro):
    x, decay, threshold, kwargs, _ = problem("batch", astro, torch.float32, seed=4)
    x, decay, threshold = (t.detach().to(device) for t in (x, decay, threshold))
    slow = Astrocyte(*(t.detach().to(device) for t in kwargs["astrocyte"])) if astro else None
    state = kwargs["initial_state"].detach().to(device)
    spikes, final = lif(x, decay, threshold, initial_state=state, astrocyte=slow, reset="soft")

    steps, carried = [], state
    for t in range(x.shape[1]):
        s, carried = lif_step(x[:, t], decay, threshold, carried, astrocyte=slow, reset="soft")
        steps.append(s)
    assert torch.equal(torch.stack(steps, 1), spikes) and torch.equal(carried, final)

    head, middle = lif(x[:, :4], decay, threshold, initial_state=state, astrocyte=slow, reset="soft")
    tail, end = lif(x[:, 4:], decay, threshold, initial_state=middle, astrocyte=slow, reset="soft")
    assert torch.equal(torch.cat([head, tail], 1), spikes) and torch.equal(end, final)

    lengths = (9, 2, 5)
    packed = torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None]
    cu_seqlens = torch.tensor([0, 9, 11, 16], dtype=torch.int32, device=device)
    s, f = lif(packed, decay, threshold, initial_state=state, astrocyte=slow, cu_seqlens=cu_seqlens, reset="soft")
    assert torch.equal(s[0], torch.cat([spikes[b, :n] for b, n in enumerate(lengths)])) and torch.equal(f[0], final[0])

    fresh = torch.zeros(1, 16, dtype=torch.bool, device=device)
    fresh[0, [9, 11]] = True
    masked, _ = lif(packed, decay, threshold, astrocyte=slow, reset_mask=fresh, reset="soft")
    apart, _ = lif(packed, decay, threshold, astrocyte=slow, cu_seqlens=cu_seqlens, reset="soft")
    assert torch.equal(masked, apart)


@tiers
@pytest.mark.parametrize("astro", [False, True], ids=["lif", "astro"])
def test_truncated_gradients_are_those_of_separate_pieces(device, astro):
    x, decay, threshold, kwargs, _ = problem("batch", astro, torch.float32, seed=5)
    x = x.detach().to(device).requires_grad_()
    slow = Astrocyte(*(t.detach().to(device) for t in kwargs["astrocyte"])) if astro else None
    decay, threshold = decay.detach().to(device), threshold.detach().to(device)
    ds = torch.randn(x.shape, device=device)
    whole, _ = lif(x, decay, threshold, astrocyte=slow, temporal_grad="truncated", window=4)
    got = torch.autograd.grad(whole, x, ds)[0]
    state, pieces = None, []
    for start in range(0, x.shape[1], 4):
        spikes, state = lif(x[:, start : start + 4], decay, threshold, astrocyte=slow, initial_state=state)
        state = state.detach()
        pieces.append(spikes)
    torch.testing.assert_close(got, torch.autograd.grad(torch.cat(pieces, 1), x, ds)[0])
    one = torch.autograd.grad(lif(x, decay, threshold, astrocyte=slow, temporal_grad="truncated", window=1)[0], x, ds)
    none = torch.autograd.grad(lif(x, decay, threshold, astrocyte=slow, temporal_grad="none")[0], x, ds)
    assert torch.equal(one[0], none[0])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("width", [0.5, 2.0])
def test_surrogates_have_peak_one_over_width_and_area_one(surrogate, width):
    from spikelm.kernels.lif_cpu import surrogate_slope

    z = torch.linspace(-400.0, 400.0, 1600001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(surrogate_primal(z, surrogate, width).sum(), z)
    z = z.detach()
    torch.testing.assert_close(surrogate_slope(z.clone(), surrogate, width), slope)
    assert slope.max().item() == pytest.approx(1.0 / width, rel=1e-6)
    assert torch.trapezoid(slope, z).item() == pytest.approx(1.0, rel=2e-3)


@pytest.mark.usefixtures("poisoned")
@tiers
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 1, 1)])
def test_little_or_nothing(device, shape):
    x = torch.ones(shape, device=device, requires_grad=True)
    state = torch.full((shape[0], shape[2]), 0.25, device=device, requires_grad=True)
    spikes, final = lif(x, 0.5, 1.0, initial_state=state)
    assert spikes.shape == x.shape and final.shape == state.shape
    (spikes.sum() + final.sum()).backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(state.grad).all()
    if shape[1] == 0:
        assert torch.equal(final, state) and (state.grad == 1).all()


@tiers
def test_only_one_output_is_used(device):
    x = torch.randn(2, 5, 3, device=device, requires_grad=True)
    spikes, _ = lif(x, 0.5, 1.0)
    (a,) = torch.autograd.grad(spikes.sum(), x)
    (b,) = torch.autograd.grad(lif(x, 0.5, 1.0)[1].sum(), x)
    (both,) = torch.autograd.grad(sum(out.sum() for out in lif(x, 0.5, 1.0)), x)
    torch.testing.assert_close(a + b, both)


@tiers
def test_strided_input_and_expanded_gradient(device):
    x = torch.randn(7, 2, 6, device=device)
    decay = torch.tensor([0.5], device=device, requires_grad=True)
    turned = x.transpose(0, 1)[..., ::2].requires_grad_()
    straight = turned.detach().contiguous().requires_grad_()
    a, b = (torch.autograd.grad(lif(t, decay, 0.8)[0].sum(), (t, decay)) for t in (turned, straight))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@tiers
@pytest.mark.parametrize("astro", [False, True], ids=["lif", "astro"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(device, astro, layout):
    x, decay, threshold, kwargs, _ = problem(layout, astro, torch.float32, masked=True)
    params = module._stack_params(x, decay, threshold, kwargs["astrocyte"]).detach().to(device).requires_grad_()
    state = kwargs["initial_state"].detach().to(device)
    state = (state if astro else state[:, None]).requires_grad_()
    x = x.detach().to(device).requires_grad_()
    cu_seqlens = kwargs["cu_seqlens"]
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
    rest = (cu_seqlens, kwargs["reset_mask"].to(device))
    options = ("hard", False, "atan", 1.0, True, 3)
    torch.library.opcheck(module._lif, (x, params, state, *rest, *options, True))
    x, params, state = x.detach(), params.detach(), state.detach()
    spikes, final, history = module._lif(x, params, state, *rest, *options, True)
    torch.library.opcheck(module._lif_backward, (spikes, final, x, params, state, history, *rest, *options))


def test_torch_compile_without_a_graph_break():
    *_, kwargs, leaves = problem("packed", True, torch.float32)

    def use(x, decay, threshold, state, *slow):
        slow = Astrocyte(*slow)
        spikes, final = lif(
            x * 1.5, decay, threshold, initial_state=state, cu_seqlens=kwargs["cu_seqlens"], astrocyte=slow
        )
        step, _ = lif_step(x[:, 0], decay, threshold, reset="soft")
        return spikes.sum() * 0.5 + final.square().sum() + step.sum()

    expected, got = use(*leaves), torch.compile(use, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_no_history_is_kept_without_a_gradient():
    x = torch.randn(1, 4, 3)
    params, state = module._stack_params(x, 0.5, 1.0, None), torch.zeros(1, 1, 3)
    assert module._lif(x, params, state, None, None, "hard", False, "atan", 1.0, True, 0, False)[2].numel() == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"x: expected a floating tensor \[B, T, D\]"),
        ({"decay": 1.5}, r"decay: expected a number in \[0, 1\]"),
        ({"decay": torch.ones(3)}, r"decay: expected a float or a tensor \[1\] or \[4\]"),
        ({"threshold": torch.ones(1, 4)}, "threshold: expected"),
        ({"reset": "sometimes"}, "reset: expected one of"),
        ({"surrogate": "step"}, "surrogate: expected one of"),
        ({"gain": "two"}, "gain: expected one of"),
        ({"width": 0.0}, "width: expected a number > 0"),
        ({"temporal_grad": "half"}, "temporal_grad: expected one of"),
        ({"temporal_grad": "truncated"}, "window: expected a number"),
        ({"window": 3}, "window: expected a number"),
        ({"temporal_grad": "truncated", "window": 0}, "window: expected at least 1"),
        ({"initial_state": torch.ones(2, 3)}, r"initial_state: expected \[2, 4\], got \[2, 3\]"),
        ({"astrocyte": Astrocyte(2.0, 0.9, 1.0, 0.0, 0.0)}, "trace_decay: expected"),
        ({"reset_mask": torch.ones(2, 3)}, "reset_mask: expected bool"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
        ({"x": torch.ones(1, 3, 4), "cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens"),
        ({"x": torch.ones(1, 3, 4), "cu_seqlens": torch.tensor([0, 2, 1, 3])}, "cu_seqlens"),
    ],
)
def test_errors_name_the_argument(kwargs, message):
    kwargs = {"x": torch.ones(2, 3, 4), "decay": 0.5, "threshold": 1.0, **kwargs}
    with pytest.raises(ValueError, match=message):
        lif(**kwargs)


def test_step_wants_one_token():
    with pytest.raises(ValueError, match="x: expected one token per row"):
        lif_step(torch.ones(2, 3, 4), 0.5, 1.0)
