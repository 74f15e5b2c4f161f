"""`spikelm bench`: its commands; what they run is imported when it is asked for."""

import sys
from pathlib import Path
from typing import Any

import click

from spikelm.validation import PACKED_WEIGHTS


@click.group()
def bench() -> None:
    """Measure speed, side by side in one run."""


@bench.command("kernels")
@click.option("--op", "ops", multiple=True, help="An operator; may be repeated.  [default: all]")
@click.option("--length", "lengths", type=click.IntRange(min=1), multiple=True, default=(512, 2048), show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=9, show_default=True)
@click.option("--width", type=click.IntRange(min=1), default=64, show_default=True, help="Channels of a head.")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--reference-limit", default=2048, show_default=True, help="Longest text that the definitions run on.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--device", help="cpu or cuda.  [default: cuda if there is one]")
@click.option("--out", "output", type=click.Path(path_type=Path), help="JSON file.")
def bench_kernels(ops: tuple[str, ...], **choices: Any) -> None:
    """Every operator beside its definition and, where installed, beside the kernels that people use today."""
    from spikelm.eval.bench_kernels import run  # draws in every kernel: not for the other commands

    run(ops=list(ops) or None, **choices)


@bench.command("decode")
@click.argument("model", required=False)
@click.option("--baseline", help="The dense model it came from: a folder, hub id or .gguf file.")
@click.option("--shape", type=click.Choice(["1b"]), help="Instead of MODEL: random weights, four layers of this size.")
@click.option(
    "--weights",
    type=click.Choice(PACKED_WEIGHTS),
    multiple=True,
    default=("fp32", "int8", "int4"),
    show_default=True,
    help="Formats, one after the other.",
)
@click.option("--batch", "batches", type=click.IntRange(1, 8), multiple=True, default=(1, 2, 4, 8), show_default=True)
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(min=1),
    multiple=True,
    default=(128, 512, 2048, 8000),
    show_default=True,
    help="Tokens in front of those that are timed.",
)
@click.option("--steps", type=click.IntRange(min=4), default=48, show_default=True, help="Tokens timed at every point.")
@click.option("--curve/--no-curve", default=True, show_default=True, help="Speed against the share of silent inputs.")
@click.option("--quick", is_flag=True, help="Few points: batches 1 and 4, contexts 128 and 512, 16 tokens of each.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench_decode"), show_default=True)
def bench_decode(model: str | None, quick: bool, out: Path, **choices: Any) -> None:
    """Tokens per second of MODEL with and without events, beside its dense source; where the time goes.

    The source also runs in llama.cpp if it is a .gguf file and the package llama-cpp-python is installed.
    """
    from spikelm.eval.bench_decode import run

    if quick:
        choices |= {"batches": (1, 4), "contexts": (128, 512), "steps": 16}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in choices.items()}
    run(model, quick=quick, out=out, **listed)
    print((out / "decode.md").read_text(encoding="utf-8"))
    print(f"Wrote {out / 'decode.json'}, {out / 'decode.md'}, {out / 'decode.png'}.", file=sys.stderr, flush=True)
