"""One small call of every op, forward and backward: the compile tier compiles whatever these calls launch."""

import torch


def attention(leaf, width):
    from spikelm.kernels.gla import gla
    from spikelm.kernels.simple_gla import simple_gla

    q, k, v, g = (leaf(1, 4, 2, width) for _ in range(4))
    gla(q, k, v, g)[0].sum().backward()
    simple_gla(q, k, v, leaf(1, 4, 2))[0].sum().backward()


def delta_rule(leaf, width):
    from spikelm.kernels.delta_rule import gated_delta_rule, generalized_delta_rule

    gated_delta_rule(*(leaf(1, 4, 2, width) for _ in range(3)), leaf(1, 4, 2), leaf(1, 4, 2))[0].sum().backward()
    generalized_delta_rule(*(leaf(1, 4, 2, width) for _ in range(6)))[0].sum().backward()


def scan(leaf, width):
    from spikelm.kernels.scan import scan

    scan(leaf(1, 4, width), leaf(1, 4, width))[0].sum().backward()


def lif(leaf, width):
    from spikelm.kernels.lif import Astrocyte, lif

    for unit in (None, Astrocyte(0.9, 0.8, 4.0, 0.5, 0.2)):
        lif(leaf(1, 4, width), 0.5, 1.0, astrocyte=unit)[0].sum().backward()


def egru(leaf, width):
    from spikelm.kernels.egru import egru

    a, weight, threshold = leaf(1, 4, 3 * width), leaf(2, width // 2, 3 * width // 2), leaf(width)
    mask = torch.ones(1, 4, width, dtype=torch.bool)
    egru(a, weight, threshold, form="evnn", bias=leaf(3 * width), zoneout=mask)[0].sum().backward()
    egru(a, weight, threshold, form="paper")[1].sum().backward()


def spike_encode(leaf, width):
    from spikelm.kernels.spike_encode import rms_norm_spike_encode, spike_encode, spike_quantize

    x = leaf(4, width)
    spike_encode(x, 3.0)
    spike_quantize(x, 3.0, dead_zone=0.5, magnitude=leaf(1) + 1, max_count=4).sum().backward()
    rms_norm_spike_encode(x, leaf(width), 3.0, eps=1e-6)


def spike_train(leaf, width):
    from spikelm.kernels.spike_train import bit_spikes, collapse, expand, pack, unpack

    counts, trains = torch.zeros(4, width), torch.zeros(4, 4, width, dtype=torch.int8)
    for code in ("binary", "ternary", "bitwise", "twos_complement"):
        expand(counts, code, 4)
        collapse(trains, code)
        bit_spikes(counts, code, 4)
    for planes in (1, 2):
        unpack(pack(trains, signed=planes == 2), width)


def wkv(leaf, width):
    from spikelm.kernels.wkv import wkv

    k, v = leaf(1, 4, width), leaf(1, 4, width)
    for masks in ({}, {"valid": torch.ones(1, 4, dtype=torch.bool)}):
        wkv(k, v, leaf(width), leaf(width), **masks)[0].sum().backward()


def window_linear(leaf, width):
    from spikelm.kernels.window_linear import window_linear

    q, k, v, fq, fk = (leaf(1, 4, 2, width) for _ in range(5))
    window_linear(q, k, v, fq, fk, leaf(2) + 1, window=3)[0].sum().backward()


def event_linear(leaf, width):
    from spikelm.kernels.event_linear import event_linear, spike_linear
    from spikelm.kernels.weight_rows import pack_rows

    for batch, format in ((1, "fp32"), (1, "bf16"), (2, "int16"), (4, "int8"), (8, "int4")):
        x, rows = leaf(batch, width).detach(), pack_rows(torch.zeros(3 * width, width), format, 32)
        event_linear(x, rows, threshold=x[:, :1])
        spike_linear(x, rows, 3.0, leaf(3 * width).detach(), dead_zone=0.5, max_count=4)


CALLS = (attention, window_linear, delta_rule, scan, lif, egru, spike_encode, spike_train, wkv, event_linear)


def run_every_op(dtype, width):
    """Call every op once with heads or rows of `width` channels; `leaf(*shape)` makes an input with a gradient."""

    def leaf(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    for call in CALLS:
        call(leaf, width)
