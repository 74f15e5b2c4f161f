"""What the Triton kernels share. Only `*_triton.py` files import this; see `runtime.py` for the rest.

House rules: elementwise math in float32 right after the load; matrix products through `dot`; addresses in int64;
neither block pointers nor libdevice; blocks named i_ (index), o_ (offsets), p_ (pointers), m_ (mask), b_ (tile).
"""

from collections.abc import Callable

import triton
import triton.language as tl

from spikelm.kernels.runtime import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
EXACT = tl.constexpr("ieee")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = EXACT):
    """a @ b in float32. Operands keep their dtype, so that 16-bit tiles reach the matrix units.

    The interpreter holds bfloat16 as raw integers, so there operands are widened. PRECISION matters for float32
    operands only: "ieee" is exact, "tf32" is what a GPU does fast.
    """
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


def autotune(configs: list[triton.Config], key: list[str]) -> Callable:
    """`triton.autotune` over few configs; the first one alone under the interpreter, which cannot measure.

    Key only on dimensions that change the best tile, never on time or batch: every new key value tunes anew.
    """
    return triton.autotune(configs=configs[:1] if INTERPRETED else configs, key=key)


def next_power_of_two(n: int, least: int = 16) -> int:
    """Smallest power of two that holds n and is at least `least` (16 is the least a matrix unit takes)."""
    return max(least, triton.next_power_of_2(n))
