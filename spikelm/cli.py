"""The `spikelm` command: quickstart, convert, import, export, train, generate, eval, compare, bench."""

import sys
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import spikelm
from spikelm.conversion.convert import convert
from spikelm.conversion.folder import add_measurements, check_out
from spikelm.conversion.importing import export_checkpoint, import_checkpoint
from spikelm.conversion.published import KINDS
from spikelm.conversion.smollm import smollm2_gguf
from spikelm.conversion.sources import quiet
from spikelm.conversion.texts import evaluation_sample
from spikelm.eval.bench_commands import bench
from spikelm.eval.data import Text, read_texts
from spikelm.eval.evaluate import PARTS, assigned, evaluate, failed
from spikelm.inference.prepare import EVENTS, prepare_for_inference, set_events
from spikelm.loading import load_model
from spikelm.spiking import SpikeStatistics, execute_trains, spike_groups
from spikelm.validation import PACKED_WEIGHTS

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
RECIPES = ("pretrain", "distill", "extend_context", "sft")
QUICKSTART_PROMPT = "What is a spiking neural network? Answer in two sentences."

_execute = click.option(
    "--execute",
    type=click.Choice(["counts", "trains"]),
    default="counts",
    show_default=True,
    help="How spike sites hand on what they code: as counts, or as trains, slot by slot.",
)


def _stored(command: Any) -> Any:
    """Options of commands that run a model laid out for inference."""
    weights = click.option(
        "--weights",
        type=click.Choice(PACKED_WEIGHTS),
        help="Lay the weights out for event-driven inference in this format.  [default: as they are]",
    )
    events = click.option(
        "--events",
        type=click.Choice(EVENTS),
        help="Whether silent inputs are skipped; needs --weights or packed weights.  [default: auto]",
    )
    return weights(events(command))


def _lay_out(model: Any, weights: str | None, events: str | None) -> None:
    """Prepare a model as the options of `_stored` say."""
    if model.config.model_type != "spikelm" and (weights or events):
        raise ValueError("--weights and --events are for spikelm models; convert this one first.")
    if weights is not None:
        prepare_for_inference(model, weights, events or "auto")
    elif events is not None:
        set_events(model, events)


def _dtype_option(default: str) -> Any:
    return click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default=default, show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(spikelm.__version__, prog_name="spikelm")
def app() -> None:
    """Load, convert and evaluate spiking language models."""


@app.command()
@click.option("--model", help="Hub id, folder or .gguf file.  [default: SmolLM2-135M-Instruct]")
@click.option("--out", type=click.Path(path_type=Path), default=Path("quickstart"), show_default=True)
@click.option("--silent-share", default=0.30, show_default=True, help="Share of weight reads to make unnecessary.")
@click.option("--k", default=4.0, show_default=True, help="Spike counts per mean magnitude.")
@click.option("--tokens", default=8000, show_default=True, help="Tokens behind the headline figures.")
@click.option("--curve-tokens", default=2000, show_default=True, help="Tokens behind each point of the curve.")
def quickstart(model: str | None, out: Path, silent_share: float, k: float, tokens: int, curve_tokens: int) -> None:
    """Convert a real model, load it back, generate from it, evaluate it beside its source."""
    started = time.monotonic()
    check_out(out, overwrite=True)
    _say("1/5  Source")
    source = model or str(smollm2_gguf())
    _say("2/5  Converting")
    convert(source, out, k=k, silent_share=silent_share, dtype="float32", overwrite=True)
    _say(f"3/5  Loading {out} with AutoModelForCausalLM.from_pretrained")
    with quiet():
        spiking = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    _say("4/5  Generating")
    _generate(spiking, tokenizer, QUICKSTART_PROMPT, 60, sample=False, execute="counts", chat=True)
    _say("5/5  Evaluating beside the source")
    baseline, _ = load_model(source, dtype=torch.float32)
    text = Text("Python reference", evaluation_sample(), "pydoc_data.topics, topics not calibrated on")
    report = evaluate(
        spiking,
        baseline,
        tokenizer,
        [text],
        settings={"quality": {"tokens": tokens, "curve_tokens": curve_tokens}},
        names=(str(out), model or "SmolLM2-135M-Instruct"),
        out=out,
    )
    _record(out, report)
    _say_report(report, out)
    _say(f"Done in {time.monotonic() - started:.0f} s. Next: AutoModelForCausalLM.from_pretrained({str(out)!r})")


@app.command("convert")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--mixers",
    "--plan",
    "mixers",
    default="keep",
    show_default=True,
    help="`keep`, a mixer for all layers, `uniform:N`, `auto`, or a comma-separated list with one per layer.",
)
@click.option("--target", default="gla", show_default=True, help="Mixer of layers that `uniform:N` and `auto` change.")
@click.option("--keep", default=0.25, show_default=True, help="Layers that `auto` leaves; below 1: their share.")
@click.option("--window", type=int, help="Width of new windows, in tokens.")
@click.option("--spikes", default="all", show_default=True, help="`all`, `none`, or some of qkv,o,gate_up,down.")
@click.option("--code", default="bitwise", show_default=True, help="bitwise, ternary or twos_complement.")
@click.option("--k", type=float, help="Spike counts per mean magnitude.  [default: 3, or 4 with a silent share]")
@click.option("--dead-zone", default=0.0, show_default=True, help="Silent below this share of the mean magnitude.")
@click.option("--threshold", default="token", show_default=True, help="token, calibrated or learned.")
@click.option("--silent-share", type=float, help="Calibrate dead zones: share of weight reads to make unnecessary.")
@click.option("--allocation", default="gradient", show_default=True, help="Of the silent share: gradient or uniform.")
@click.option("--max-count", type=int, help="Clip counts to this magnitude; small ones need --rotate.")
@click.option("--rotate", is_flag=True, help="Spread outliers over all channels; excludes a silent share.")
@click.option("--calibration-text", type=click.Path(path_type=Path), help="UTF-8 file.  [default: a built-in sample]")
@click.option(
    "--transfer-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens that new mixers learn from, each fitted to the attention that it replaces; 0: they stay untrained.",
)
@click.option(
    "--transfer-text",
    type=click.Path(path_type=Path),
    multiple=True,
    help="UTF-8 file for that; may be repeated.  [default: the calibration text]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if a conversion wrote it.")
@_dtype_option("auto")
def convert_command(
    source: str,
    out: Path,
    mixers: str,
    spikes: str,
    calibration_text: Path | None,
    transfer_text: tuple[Path, ...],
    **choices: Any,
) -> None:
    """Convert SOURCE (a model folder, a hub id or a .gguf file) and write a complete model folder to OUT."""
    text = read_texts([calibration_text])[0].content if calibration_text is not None else None
    convert(
        source,
        out,
        mixers=mixers.split(",") if "," in mixers else mixers,
        sites=spikes if spikes in ("all", "none") else spikes.split(","),
        calibration_text=text,
        transfer_text=[one.content for one in read_texts(transfer_text)] or None,
        **choices,
    )
    _say(f"Wrote {out}. Next: spikelm generate {out} --prompt ... ; spikelm eval {out} --baseline {source} --out ...")


@app.command("import")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--binary-embedding/--no-binary-embedding",
    default=None,
    help="spikegpt: embeddings become 0 or 1, as in training, or stay as they are.  [default: 0 or 1]",
)
@click.option(
    "--egru-drop-internal/--no-egru-drop-internal",
    default=None,
    help="evnn-egru-lm: every pass begins without internal states, as in the published benchmark, or carries them on.  "
    "[default: carries them on]",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if a conversion or an import wrote it.")
def import_command(kind: str, checkpoint: str, out: Path, overwrite: bool, **choices: Any) -> None:
    """Read CHECKPOINT and write a spikelm model folder to OUT.

    CHECKPOINT is a published model of KIND: its folder, or its one file of weights (SpikeGPT-216M.pth). A tokenizer
    that lies beside the weights is taken along.
    """
    given = {field: value for field, value in choices.items() if value is not None}
    record = import_checkpoint(kind, checkpoint, out, overwrite=overwrite, **given)
    for note in record["notes"]:
        _say(note)
    _say(f"Wrote {out}, {record['result']['parameters']:,} parameters. Next: spikelm generate {out} --prompt ...")


@app.command("export")
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
def export_command(kind: str, model: str, out: Path) -> None:
    """Write MODEL (a spikelm model folder) to the folder OUT as a published KIND: its keys, its kind of file."""
    export_checkpoint(kind, model, out)
    _say(f"Wrote {out}.")


class Recipes(click.Group):
    """Recipes as commands, each imported when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Their names."""
        return list(RECIPES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of a recipe."""
        return import_module(f"spikelm.recipes.{name}").main if name in RECIPES else None


@app.group(cls=Recipes)
def train() -> None:
    """Train by a recipe and its YAML file; with `accelerate launch -m spikelm.recipes.NAME` on many devices."""


@app.command()
@click.argument("model")
@click.option("--prompt", required=True, help="Text to answer, or to continue with --raw.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--sample", is_flag=True, help="Sample instead of taking the likeliest token.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@_stored
@_execute
@_dtype_option("auto")
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    sample: bool,
    raw: bool,
    weights: str | None,
    events: str | None,
    execute: str,
    dtype: str,
) -> None:
    """Stream text from MODEL, and say how silent it was."""
    # Laid out for inference, activations are fastest in float32.
    network, tokenizer = load_model(model, dtype=DTYPES.get(dtype, torch.float32 if weights else None))
    _lay_out(network, weights, events)
    _generate(network, tokenizer, prompt, max_new_tokens, sample, execute, chat=not raw)


@app.command("eval")
@click.argument("model")
@click.option(
    "--baseline", help="The model it came from: a folder, hub id or .gguf file.  [default: nothing beside it]"
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True, help="Folder.")
@click.option("--parts", help=f"Some of {','.join(PARTS)}.  [default: all; with --tasks, tasks alone]")
@click.option("--quick", is_flag=True, help="Fewer tokens in every part: minutes for a small model on a CPU.")
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="UTF-8 text file; may be repeated.")
@click.option("--tasks", help="Tasks of lm-evaluation-harness, with commas.  [default: small ones without a download]")
@click.option(
    "--include-path", type=click.Path(path_type=Path), multiple=True, help="Folder with task files; may be repeated."
)
@click.option("--tokens", type=int, help="Tokens of each text for quality.  [default: 8000; quick: 2048]")
@click.option("--window", type=int, help="Tokens of a window; windows are disjoint.  [default: 512]")
@click.option("--controls/--no-controls", default=True, show_default=True, help="Measure the control rows too.")
@click.option("--curve-tokens", type=int, help="Tokens of a point of the curve; 0: no curve.  [default: 2000]")
@click.option("--calibration-text", type=click.Path(path_type=Path), help="For controls and curve.")
@click.option("--set", "changes", metavar="PART.NAME=VALUE", multiple=True, help="Any other setting of a part.")
@_stored
@_execute
@_dtype_option("float32")
def eval_command(
    model: str,
    baseline: str | None,
    out: Path,
    parts: str | None,
    quick: bool,
    text: tuple[Path, ...],
    calibration_text: Path | None,
    weights: str | None,
    events: str | None,
    execute: str,
    dtype: str,
    **choices: Any,
) -> None:
    """Measure MODEL, beside its baseline if one is given: one report from all parts.

    The same command goes on where an interrupted one stopped. A part that fails is reported; then the exit code is 1.
    """
    settings = _settings(**choices)
    chosen = parts.split(",") if parts else ["tasks"] if "tasks" in settings.get("tasks", {}) else list(PARTS)
    texts = read_texts(text) or [Text("Python reference", evaluation_sample(), "pydoc_data.topics")]
    calibration = read_texts([calibration_text])[0] if calibration_text is not None else None
    network, tokenizer = load_model(model, dtype=DTYPES.get(dtype))
    _lay_out(network, weights, events)
    source = load_model(baseline, dtype=DTYPES.get(dtype))[0] if baseline is not None else None
    report = evaluate(
        network,
        source,
        tokenizer,
        texts,
        parts=chosen,
        quick=quick,
        settings=settings,
        calibration=calibration,
        execute=execute,
        names=(model, baseline),
        out=out,
    )
    _say_report(report, out)


def _settings(
    tasks: str | None,
    include_path: tuple[Path, ...],
    tokens: int | None,
    window: int | None,
    controls: bool,
    curve_tokens: int | None,
    changes: tuple[str, ...],
) -> dict[str, dict[str, Any]]:
    """Options of `spikelm eval` as settings of parts."""
    settings = assigned(changes)
    given: dict[tuple[str, str], Any] = {
        ("quality", "tokens"): tokens,
        ("quality", "window"): window,
        ("quality", "controls"): None if controls else False,
        ("quality", "curve"): False if curve_tokens == 0 else None,
        ("quality", "curve_tokens"): curve_tokens or None,
        ("tasks", "tasks"): tuple(tasks.split(",")) if tasks else None,
        ("tasks", "include_path"): tuple(map(str, include_path)) or None,
    }
    for (part, field), value in given.items():
        if value is not None:
            settings.setdefault(part, {})[field] = value
    return settings


@app.command()
@click.argument("reports", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for compare.md and compare.html.")
def compare(reports: tuple[str, ...], out: Path | None) -> None:
    """Put REPORTS, folders that `spikelm eval` wrote, side by side."""
    from spikelm.eval.compare_reports import column_names, compare_reports, read_report

    page = compare_reports(dict(zip(column_names(reports), map(read_report, reports))), PARTS)
    print(page)
    if out is not None:
        from spikelm.eval.report import write_pages

        write_pages(page, out, "compare")
        _say(f"Wrote {out / 'compare.md'} and {out / 'compare.html'}.")


app.add_command(bench)


def _generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, sample: bool, execute: str, chat: bool
) -> None:
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("The prompt is empty; give some text with --prompt.")
    started = time.monotonic()
    with execute_trains(model) if execute == "trains" else nullcontext():
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    new = out.shape[1] - inputs["input_ids"].shape[1]
    line = f"[{new} tokens, {new / (time.monotonic() - started):.1f} tokens/s"
    if next(spike_groups(model), None) is not None:
        # Counted in a second pass over the same text: counting costs more than decoding.
        with torch.no_grad(), SpikeStatistics(model) as statistics:
            model(out, logits_to_keep=1)
        summary = statistics.summary()
        line += (
            f"; {summary['silent_share_reads']:.1%} of weight reads behind spike sites unnecessary, "
            f"{summary['firing_rate']['bitwise']:.2f} spikes per input (bitwise)"
        )
    _say(line + "]")


def _record(folder: Path, report: dict[str, Any]) -> None:
    names = ("perplexity_ratio", "top1_agreement", "kl_nats", "silent_share", "silent_share_reads")
    add_measurements(folder, {name: report[name] for name in names if report.get(name) is not None})


def _say_report(report: dict[str, Any], out: Path) -> None:
    """What came out, in a line, and what failed: then the command ends with exit code 1."""
    numbers = []
    if report["perplexity_ratio"] is not None:
        numbers.append(f"perplexity ratio {report['perplexity_ratio']:.3f}")
        numbers.append(f"top-1 agreement {report['top1_agreement']:.3f}, KL {report['kl_nats']:.4f} nats")
    elif report["bits_per_byte"]["model"] is not None:
        numbers.append(f"{report['bits_per_byte']['model']:.3f} bits per byte")
    if report["silent_share_reads"] is not None:
        numbers.append(f"silent share of weight reads {report['silent_share_reads']:.3f}")
    if numbers:
        _say(", ".join(numbers))
    _say(f"Report: {out / 'report.md'}, {out / 'report.html'}, {out / 'report.json'} and pictures beside them.")
    if errors := failed(report):
        for error in errors:
            _say("spikelm: failed: " + " ".join(error.split()))
        click.get_current_context().exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0; 2 after one line on stderr that says what to do; 1 if a part of
    an evaluation failed.
    """
    try:
        code = app.main(arguments, prog_name="spikelm", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        return _fail(f"{error.format_message()} See {context.command_path if context else 'spikelm'} --help.")
    except (click.Abort, KeyboardInterrupt):
        _say("spikelm: interrupted")
        return 130
    except (ValueError, OSError, FloatingPointError, StrictDataclassError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    _say("spikelm: error: " + " ".join(message.split()))
    return 2


if __name__ == "__main__":
    sys.exit(main())
