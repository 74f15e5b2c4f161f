"""Event-driven linear: every format, path and batch against the float64 definition; integers exactly."""

from itertools import product

import pytest
import torch
from kernel_cases import RATIOS, assert_close, banded, place, tiers

from spikelm.kernels import event_linear as module
from spikelm.kernels import event_linear_cpp
from spikelm.kernels.event_call import Code, EventCall, Norm
from spikelm.kernels.event_linear import event_linear, event_linear_reference, spike_linear, table_linear
from spikelm.kernels.runtime import INTERPRETED
from spikelm.kernels.spike_encode import _check, spike_encode, spike_encode_reference
from spikelm.kernels.weight_rows import (
    FLOATS,
    FORMATS,
    LARGEST_CODE,
    codes_of,
    lookup,
    pack_rows,
    pack_table,
    quantized,
    rows_of_codes,
    table_of_codes,
    unpack,
)

formats = pytest.mark.parametrize("format", FORMATS)
# Batch, inputs, outputs, group: odd widths, groups that do not divide, more rows than share a list of events.
SHAPES = [(1, 75, 61, 16), (2, 64, 130, 37), (3, 33, 1, 128), (5, 130, 257, 64), (8, 100, 64, 96), (11, 16, 40, 8)]
SILENT = (0.0, 0.4, 0.97, 1.0)


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    """The C++ loops, and what runs without them."""
    if request.param == "torch":
        monkeypatch.setattr(event_linear_cpp, "library", lambda: None)
    elif event_linear_cpp.library() is None:
        pytest.skip("needs a C++ compiler")
    return request.param


def weights(outputs, inputs):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs * 1000 + inputs))


def counts(batch, inputs, silent, largest=5):
    s = torch.randint(-largest, largest + 1, (batch, inputs)).float()
    return s.masked_fill_(torch.rand(batch, inputs) < silent, 0.0)


def problem(format, shape, silent, device="cpu"):
    """Counts, thresholds, rows and bias on a device, all amid NaN where they can be."""
    batch, inputs, outputs, group = shape
    rows = pack_rows(weights(outputs, inputs), format, group).to(place(device))
    s, threshold, bias = counts(batch, inputs, silent), torch.rand(batch, 1) + 0.1, torch.randn(outputs)
    return (*(banded(t.to(place(device))) for t in (s, threshold, bias)), rows)


def check_all(format, shape, device):
    for silent, dense, with_bias in product(SILENT, (False, True), (False, True)):
        s, threshold, bias, rows = problem(format, shape, silent, device)
        bias = bias if with_bias else None
        for v_th in (threshold, None):
            y = event_linear(s, rows, bias, threshold=v_th, dense=dense)
            expected = event_linear_reference(s.double(), rows, bias, threshold=v_th)
            assert y.dtype is torch.float32
            assert_close(f"{format} {shape} {silent} {dense}", y, expected, RATIOS[torch.float32])


@pytest.mark.usefixtures("poisoned", "engine")
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_format(format, shape):
    check_all(format, shape, "cpu")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", [pytest.param("interpreted", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("format", FORMATS[1:])
def test_every_format_interpreted(format, device):
    for shape in ((1, 75, 61, 16), (3, 33, 70, 20)):
        for silent, v_th in product((0.4, 1.0), (True, False)):
            s, threshold, bias, rows = problem(format, shape, silent, device)
            threshold = threshold if v_th else None
            y = event_linear(s, rows, bias, threshold=threshold)
            expected = event_linear_reference(s.double(), rows, bias, threshold=threshold)
            assert_close(f"{format} {shape}", y, expected, RATIOS[torch.float32])


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096, 14336, 128)], ids=str)
def test_every_format_gpu(format, shape):
    check_all(format, shape, "gpu")


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("format", FLOATS)
def test_float64(format):
    s, threshold, bias, rows = (
        t.double() if isinstance(t, torch.Tensor) else t for t in problem(format, SHAPES[1], 0.5)
    )
    y = event_linear(s, rows, bias, threshold=threshold)
    assert y.dtype is torch.float64
    assert_close(format, y, event_linear_reference(s, rows, bias, threshold=threshold), RATIOS[torch.float64])


@tiers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs(device, dtype):
    s, threshold, bias, rows = problem("int8", SHAPES[0], 0.5, device)
    y = event_linear(s.to(dtype), rows, bias.to(dtype), threshold=threshold)
    assert y.dtype is dtype
    assert_close("y", y, event_linear_reference(s.double(), rows, bias.to(dtype), threshold=threshold), RATIOS[dtype])


@tiers
@pytest.mark.parametrize("format", LARGEST_CODE)
@pytest.mark.parametrize("count", [127, 128, 129, 32767, 2**20 + 1, 2**24, 2.0**31, 2.0**40])
def test_integers_never_wrap(device, format, count):
    """Codes and counts of the largest size; y is as exact as float32 holds it."""
    inputs, group = 48, 32
    codes = torch.full((3, inputs), LARGEST_CODE[format], dtype=torch.int16)
    codes[1] = -LARGEST_CODE[format] - 1
    rows = rows_of_codes(codes, torch.tensor([[1.0, 0.5]]).expand(3, 2), format, group).to(place(device))
    s = torch.zeros(2, inputs)
    s[0, ::2] = count
    s[1] = -count
    s[:, 5] = 1.0
    y = event_linear(s.to(place(device)), rows, threshold=torch.ones(2, 1, device=place(device))).cpu()
    exact = [
        [
            sum(int(codes[o, i]) * int(s[b, i]) for i in range(group))
            + sum(int(codes[o, i]) * int(s[b, i]) for i in range(group, inputs)) / 2
            for o in range(3)
        ]
        for b in range(2)
    ]
    torch.testing.assert_close(y.double(), torch.tensor(exact, dtype=torch.float64), rtol=2.0**-22, atol=0.0)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("format", LARGEST_CODE)
def test_integer_sums_are_exact(format):
    """With scales and thresholds that are powers of two, not one bit is lost, whatever the order."""
    codes = torch.randint(-7, 8, (70, 90))
    scales = torch.tensor([0.25, 0.5, 1.0])[torch.randint(3, (70, 3))]
    rows, s = rows_of_codes(codes, scales, format, 40), counts(4, 90, 0.5, 300)
    y = event_linear(s, rows, threshold=torch.full((4, 1), 0.5))
    weight = codes * scales.repeat_interleave(40, 1)[:, :90]
    assert torch.equal(y.double(), s.double() @ weight.double().t() / 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.usefixtures("engine")
def test_what_is_not_finite_stays_visible(value):
    s, threshold, _, rows = problem("int8", SHAPES[4], 0.5)
    s[2, 3] = value
    y = event_linear(s, rows, threshold=threshold)
    assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("engine")
@formats
def test_neither_batch_nor_threads_nor_silence_change_a_bit(format, engine):
    s, threshold, bias, rows = problem(format, (5, 130, 700, 64), 0.6)
    s[3, 7], s[1, 100] = 400.0, 3e9  # not the same sums for all rows of the batch
    together = event_linear(s, rows, bias, threshold=threshold)
    if engine == "torch":  # its products are those of a library, which takes its own order
        alone = torch.cat([event_linear(s[b : b + 1], rows, bias, threshold=threshold[b : b + 1]) for b in range(5)])
        return torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    for b in range(5):
        assert torch.equal(event_linear(s[b : b + 1], rows, bias, threshold=threshold[b : b + 1])[0], together[b])
    assert torch.equal(event_linear(s, rows, bias, threshold=threshold, dense=True), together)
    torch.set_num_threads(3)
    assert torch.equal(event_linear(s, rows, bias, threshold=threshold), together)


@pytest.mark.usefixtures("engine")
def test_shapes_and_strides():
    s, threshold, bias, rows = problem("int4", (6, 75, 61, 16), 0.5)
    expected = event_linear(s, rows, bias, threshold=threshold)
    cube = event_linear(s.view(2, 3, 75), rows, bias, threshold=threshold.view(2, 3, 1))
    assert torch.equal(cube.view(6, 61), expected)
    assert torch.equal(event_linear(s.t().contiguous().t(), rows, bias, threshold=threshold), expected)
    wide = torch.randn(6, 150)
    wide[:, ::2] = s
    assert torch.equal(event_linear(wide[:, ::2], rows, bias, threshold=threshold), expected)
    assert event_linear(s[:0], rows, bias, threshold=threshold[:0]).shape == (0, 61)
    assert event_linear(s[0], rows, bias, threshold=threshold[0]).shape == (61,)


CODES = [
    {},
    {"dead_zone": 0.4},
    {"dead_zone": "per channel", "max_count": 2},
    {"magnitude": 0.7},
    {"magnitude": 1e-6, "dead_zone": 0.1},
]


@tiers
@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("format", ["fp32", "int8"])
def test_coding_and_product_in_one(device, code, format):
    """The counts of `spike_encode`, bit by bit, and its product."""
    x = 3.0 * torch.randn(3, 75)
    x[1] = 0.0
    code = dict(code)
    if code.get("dead_zone") == "per channel":
        code["dead_zone"] = torch.rand(75)
    k, zone, magnitude = _check(x, 3.0, code.get("dead_zone"), code.get("magnitude"), None)
    expected, v_th = spike_encode_reference(x, k, zone, magnitude, code.get("max_count"))
    rows, bias = pack_rows(weights(61, 75), format, 16), torch.randn(61)
    code = {n: v.to(place(device)) if isinstance(v, torch.Tensor) else v for n, v in code.items()}
    on = place(device)
    y, s, threshold = spike_linear(x.to(on), rows.to(on), 3.0, bias.to(on), **code)
    assert torch.equal(s.cpu(), expected) and torch.equal(threshold.cpu(), v_th)
    reference = event_linear_reference(expected.double(), rows, bias, threshold=v_th)
    assert_close("y", y, reference, RATIOS[torch.float32])


@pytest.mark.usefixtures("poisoned", "engine")
@formats
@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_table(format, batch):
    for outputs, inputs, group in ((61, 75, 16), (5, 64, 32), (130, 131, 128)):
        weight, x, bias = weights(outputs, inputs), torch.randn(batch, inputs), torch.randn(outputs)
        table = pack_table(weight, format, group)
        expected = event_linear_reference(x.double(), table, bias)
        assert_close(f"{outputs} {inputs}", table_linear(x, table, bias), expected, RATIOS[torch.float32])
        assert torch.equal(unpack(table), unpack(pack_rows(weight, format, group)))
        words = torch.tensor([[0, 3], [4, 1]])
        assert torch.equal(lookup(table, words), unpack(table)[words])


@formats
def test_size(format):
    """At most 1.1 times what the format says, at sizes of a model."""
    bits = {"fp64": 64, "fp32": 32, "bf16": 16, "int16": 16, "int8": 8, "int4": 4}[format]
    for outputs, inputs in ((960, 576), (576, 1536)):
        weight = torch.randn(outputs, inputs)
        for packed in (pack_rows([weight[:100], weight[100:]], format), pack_table(weight, format)):
            assert packed.nbytes <= 1.1 * bits / 8 * weight.numel()


@pytest.mark.parametrize("format", LARGEST_CODE)
def test_rounding_to_codes(format):
    weight = weights(40, 75)
    weight[3, :16] = 0.0
    codes, scales = quantized(weight, format, 16)
    error = (weight - unpack(pack_rows(weight, format, 16))).abs()
    step = scales.repeat_interleave(16, 1)[:, :75]
    assert (error <= 0.51 * step).all() and int(codes.abs().max()) == LARGEST_CODE[format]
    assert torch.equal(codes_of(rows_of_codes(codes, scales, format, 16)).t(), codes)
    assert torch.equal(codes_of(table_of_codes(codes, scales, format, 16)), codes)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_calls(format, batch):
    """Gate, norm, code, product and residual, as torch computes them; counts with the bits of the code."""
    rows = pack_rows(weights(61, 75), format, 16)
    code = Code(torch.tensor([4.0]), torch.tensor([0.5]))
    for gated, norm, coded, add, rectify in product((False, True), repeat=5):
        x = torch.randn(batch, 150 if gated else 75)
        y = torch.full((batch, 61), 2.0 if add else float("nan"))
        options = {"norm": Norm(torch.rand(75), 1e-5, one_plus=rectify) if norm else None, "gated": gated, "add": add}
        options["code"] = Code(code.k, code.dead_zone, rectify=rectify) if coded else None
        call = EventCall(rows, x, y, bias=torch.linspace(-1, 1, 61), **options)
        call()
        v = x.double()
        v = torch.nn.functional.silu(v[:, :75]) * v[:, 75:] if gated else v
        if norm:
            scale = torch.rsqrt(v.square().mean(1, keepdim=True) + 1e-5)
            v = v * scale * (options["norm"].weight + (1.0 if rectify else 0.0))
        v_th = None
        if coded:
            v = v.relu() if rectify else v
            s, v_th = spike_encode(v, code.k, dead_zone=code.dead_zone)
            assert torch.equal(s.float(), call.counts)
            torch.testing.assert_close(call.threshold, v_th.float(), rtol=1e-5, atol=0.0)
            v = s
        expected = event_linear_reference(v, rows, call.bias, threshold=v_th) + (2.0 if add else 0.0)
        assert_close(str(options), y, expected, RATIOS[torch.float32])


@pytest.mark.usefixtures("engine")
def test_a_prepared_call_reads_its_buffers_anew():
    x, y = torch.zeros(1, 75), torch.empty(1, 61)
    k = torch.tensor([3.0])
    table = pack_table(weights(61, 75), "int8", 16)
    calls = EventCall(pack_rows(weights(61, 75), "int8", 16), x, y, code=Code(k)), EventCall(table, x, y)
    for factor in (1.0, 2.0):
        x.normal_()
        k.fill_(3.0 * factor)
        calls[0]()
        assert torch.equal(calls[0].counts, spike_encode(x, 3.0 * factor)[0])
        calls[1]()
        assert_close("table", y, event_linear_reference(x.double(), table), RATIOS[torch.float32])


@tiers
@pytest.mark.parametrize("format", ["fp32", "int4"])
def test_opcheck(device, format):
    s, threshold, bias, rows = problem(format, SHAPES[0], 0.5, device)
    sizes = rows.format, rows.group, rows.inputs, rows.outputs
    torch.library.opcheck(module._event_linear, (s, threshold, rows.data, rows.scales, bias, *sizes, False))
    k = torch.ones(1, device=s.device)
    code = k, 0.5 * k, None, 3
    torch.library.opcheck(module._spike_linear, (s, rows.data, rows.scales, bias, *code, *sizes, False))
    table = pack_table(weights(61, 75), format, 16).to(s.device)
    torch.library.opcheck(module._table_linear, (s, table.data, table.scales, bias, *sizes))


def test_torch_compile_without_a_graph_break():
    s, threshold, bias, rows = problem("int8", SHAPES[1], 0.5)
    table = pack_table(weights(130, 64), "int8", 16)

    def use(s, threshold):
        y = event_linear(s, rows, bias, threshold=threshold) + table_linear(torch.tanh(s), table)
        return y, spike_linear(s * 2.0, rows, 3.0, bias)

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    (y, coded), (expected, expected_coded) = compiled(s, threshold), use(s, threshold)
    for got, wanted in zip((y, *coded), (expected, *expected_coded)):
        assert torch.equal(got, wanted)


def test_gradients_are_refused():
    s, threshold, _, rows = problem("fp32", SHAPES[0], 0.5)
    s.requires_grad_()
    table = pack_table(weights(61, 75), "fp32")
    calls = (
        lambda: event_linear(s, rows, threshold=threshold),
        lambda: spike_linear(s, rows, 3.0),
        lambda: table_linear(s, table),
    )
    for call in calls:
        with pytest.raises(ValueError, match="inference"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, v, r: event_linear(s[:, :-1], r), r"x must be \[..., 75\]"),
        (lambda s, v, r: event_linear(s, r, torch.ones(3)), r"bias must be \[61\]"),
        (lambda s, v, r: event_linear(s, r, threshold=v.squeeze(1)), r"threshold must be \[1, 1\]"),
        (lambda s, v, r: event_linear(s.long(), r), "x must be a floating-point tensor"),
        (lambda s, v, r: spike_linear(s, r, 0.0), "k: expected a finite number > 0"),
        (lambda s, v, r: pack_rows(weights(3, 4), "int3"), "format must be one of"),
        (lambda s, v, r: pack_rows(weights(3, 4), "int8", 0), "group must be at least 1"),
        (lambda s, v, r: pack_rows([weights(3, 4), weights(3, 5)], "int8"), "with the same inputs"),
        (
            lambda s, v, r: rows_of_codes(torch.full((2, 2), 128), torch.ones(2, 1), "int8", 2),
            "codes must be from -128",
        ),
        (lambda s, v, r: rows_of_codes(torch.ones(2, 2), torch.ones(2, 2), "int8", 2), r"scales must be \[2, 1\]"),
        (lambda s, v, r: pack_table(weights(3, 6), "int4", 3), "group must be even for int4"),
        (lambda s, v, r: EventCall(r, s.double(), torch.empty(1, 61)), r"x must be contiguous float32 \[B, 75\]"),
        (lambda s, v, r: EventCall(r, s, torch.empty(2, 61)), "y must be 1 rows"),
        (
            lambda s, v, r: EventCall(pack_table(weights(61, 75), "fp32"), s, torch.empty(1, 61), code=Code(v)),
            "code must",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    s, threshold, _, rows = problem("int8", SHAPES[0], 0.5)
    with pytest.raises(ValueError, match=message):
        call(s, threshold, rows)


def test_the_interpreter_reaches_the_kernels():
    """The interpreted tier would be empty if it did not."""
    if not INTERPRETED:
        pytest.skip("for the interpreted run")
    assert module.use_triton(torch.zeros(1))
