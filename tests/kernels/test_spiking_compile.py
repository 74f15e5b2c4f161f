"""The spiking kernels compiled for GPUs on a machine without one: they compile, and fit the target's shared memory."""

import pytest
import torch

from spikelm.kernels.runtime import HAS_TRITON, INTERPRETED

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton as a compiler, not its interpreter"),
]
SHARED = {("cuda", 80): 166912, ("cuda", 90): 232448, ("cuda", 100): 232448, ("hip", "gfx942"): 65536}
DEFAULT = [("cuda", 90), ("hip", "gfx942")]
INTEGERS = {"rows", "C", "W", "n", "slots", "n_bytes", "n_trains", "T", "D", "BT"}
NUMBERS = {"eps", "max_count", "width"}
POINTERS = {"cu_seqlens": "i64", "fresh": "u8", "cut": "u8", "trains": "i8", "packed": "u8"}


def tile(width: int) -> dict:
    from spikelm.kernels.spike_encode_triton import _tile

    return _tile(torch.empty(4, width))[2]


def kernels():
    """Name -> (module, kernel, constants with launch options, argument that has another type than float32)."""
    found = {}
    for width in (1, 576, 4096, 65536):
        for name, norm, values in (("encode", 0, False), ("quantize", 0, True), ("norm_encode", 2, False)):
            flags = {"NORM": norm, "ZONE": 2, "STORED": False, "CLIP": True, "VALUES": values, **tile(width)}
            found[f"{name}_{width}"] = ("spike_encode_triton", "encode_kernel", flags, {})
        flags = {"ZONE": 1, "STORED": True, "CLIP": True, **tile(width)}
        found[f"quantize_backward_{width}"] = ("spike_encode_triton", "quantize_backward_kernel", flags, {})
    for kind in range(3):
        flags = {"KIND": kind, "BLOCK": 512}
        for name in ("expand", "collapse", "bit_spikes"):
            types = {"spikes": "i32"} if name == "bit_spikes" else {}
            found[f"{name}_{kind}"] = ("spike_train_triton", f"{name}_kernel", flags, types)
    for planes in (1, 2):
        flags = {"PLANES": planes, "BLOCK": 128}
        found[f"pack_{planes}"] = ("spike_train_triton", "pack_kernel", flags, {})
        found[f"unpack_{planes}"] = ("spike_train_triton", "unpack_kernel", flags, {})
    for astro in (False, True):
        for reset in range(3):
            flags = {"RESET": reset, "UNIT_GAIN": True, "ASTRO": astro, "PACKED": True, "FRESH": True}
            flags |= {"STAGES": 4, "BLOCK": 64, "num_warps": 1, "enable_fp_fusion": False}
            name = f"{'astro' if astro else 'lif'}_{reset}"
            found[f"{name}_forward"] = ("lif_triton", "lif_forward_kernel", flags | {"SAVE": True}, {})
            flags = flags | {"DETACH": False, "SURROGATE": reset, "CUT": True}
            found[f"{name}_backward"] = ("lif_triton", "lif_backward_kernel", flags, {})
    return found


# One configuration of every kernel; the slow list holds all of them, in every dtype, for every target.
FEW = ("norm_encode_4096", "quantize_576", "quantize_backward_576", "expand_1", "collapse_2", "bit_spikes_2")
FEW += ("pack_2", "unpack_2", "lif_1_forward", "lif_1_backward", "astro_1_forward", "astro_1_backward")


def build(name: str, target: tuple, dtype: str):
    """Compile one kernel; `dtype` is what the model's activations have."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, flags, types = kernels()[name]
    function = getattr(importlib.import_module(f"spikelm.kernels.{module}"), kernel)
    options = {key: flags[key] for key in ("num_warps", "enable_fp_fusion") if key in flags}
    constants = {key: value for key, value in flags.items() if key not in options}
    # Width 1 reaches the kernel as a constant, as Triton specialises arguments that are 1.
    if name.endswith("_1") and "P" in constants:
        constants["C"] = 1
    activations = {"x", "dy", "dx", "spikes", "dspikes"} | ({"counts"} if constants.get("VALUES") else set())
    signature = {}
    for argument in function.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument in NUMBERS:
            signature[argument] = "fp32"
        else:
            default = dtype if argument in activations else "fp32"
            signature[argument] = "*" + types.get(argument, POINTERS.get(argument, default))
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget(*target, 64 if target[0] == "hip" else 32), options=options)


def check(name: str, target: tuple, dtype: str) -> None:
    compiled = build(name, target, dtype)
    assert compiled.metadata.shared <= SHARED[target], f"{name} wants {compiled.metadata.shared} B of shared memory"
    decides = name.startswith(("encode", "quantize", "norm", "lif", "astro"))
    if decides and target[0] == "cuda":
        assert "fma.rn.f32" not in compiled.asm["ptx"], "a fused product rounds once where the definition rounds twice"


@pytest.mark.parametrize("target", DEFAULT, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_compiles(name, target):
    check(name, target, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("target", SHARED, ids=str)
@pytest.mark.parametrize("name", kernels() if HAS_TRITON and not INTERPRETED else [])
def test_every_configuration_compiles(name, target, dtype):
    check(name, target, dtype)
