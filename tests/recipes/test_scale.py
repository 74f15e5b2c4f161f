"""Two processes compute what one does, start with the shipped launch configs, and go on from their checkpoints."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spikelm.modeling import SpikeLMDecoderLayer
from spikelm.recipes.run import run
from tests.recipes.scaled import LAUNCH, LEARNED, PLAIN, SPIKING, double, mapped, settings
from tests.recipes.tiny_run import curve, tiny_data, tiny_settings

CONFIGS = {
    "cpu": (DistributedType.NO, 1, "no"),
    "cpu_two": (DistributedType.MULTI_GPU, 2, "no"),
    "gpu": (DistributedType.NO, 1, "bf16"),
    "ddp": (DistributedType.MULTI_GPU, 8, "bf16"),
    "fsdp2": (DistributedType.FSDP, 8, "bf16"),
    "zero3": (DistributedType.DEEPSPEED, 8, "bf16"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of `scaled.py`, started as a user would."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", LAUNCH / "cpu_two.yaml"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", "-m", "tests.recipes.scaled", folder],
        capture_output=True,
        text=True,
        cwd=LAUNCH.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(out):
    return json.loads((out / "report.json").read_text())


def losses(report, key="losses"):
    return [row["loss"] for row in report[key]]


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def test_two_processes_log_the_losses_of_one(two, tmp_path):
    one, ours = run(settings(tmp_path / "one", PLAIN, 2), data=mapped), read(two / "ddp")
    assert (one["processes"], ours["processes"]) == (1, 2)
    for key in ("losses", "heldout_losses"):
        assert losses(ours, key) == pytest.approx(losses(one, key), abs=1e-4)
    assert len(set(losses(one))) == 6


def test_two_processes_that_are_started_again_go_on_number_for_number(two):
    again, whole = (
        [curve(read(two / name)[key]) for key in ("losses", "heldout_losses")] for name in ("ddp-again", "ddp")
    )
    assert again == whole
    ours, theirs = weights(two / "ddp-again"), weights(two / "ddp")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(two.glob("**/*.partial"))


def test_a_sharded_spiking_model_goes_on_from_sharded_checkpoints_and_ends_whole(two, tmp_path):
    """In float64, where spikes are exact: sharded losses, thresholds, checkpoints and the model folder."""
    one, ours = run(settings(tmp_path / "one", SPIKING, 2), prepare=double, data=mapped), read(two / "fsdp2-again")
    assert losses(ours) == pytest.approx(losses(one), abs=1e-6)  # Trainer sums them in float32
    assert losses(ours, "heldout_losses") == pytest.approx(losses(one, "heldout_losses"), abs=1e-9)
    names = {path.name for path in (two / "fsdp2-again" / "checkpoints" / "step-6").iterdir()}
    assert {"pytorch_model_fsdp_0", "optimizer_0", "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert "model.safetensors" not in names
    theirs, model = weights(tmp_path / "one"), weights(two / "fsdp2-again")
    assert model.keys() == theirs.keys() and "model.layers.0.mixer.qkv_site.dead_zone" in model
    for name, tensor in theirs.items():
        assert model[name].dtype == tensor.dtype
        torch.testing.assert_close(model[name], tensor, rtol=0, atol=1e-9)


def test_a_sharded_model_computes_in_float32_what_one_device_would(two, tmp_path):
    """bfloat16 is for matrix products; what Accelerate would do by itself rounds every parameter, and the loss."""
    dtypes = json.loads((two / "dtypes.json").read_text())
    assert {"mixer.qkv_site.magnitude", "mixer.delta.rates.A_log", "mixer.q_proj.weight"} <= dtypes.keys()
    assert set(dtypes.values()) == {"torch.float32"}
    one = run(settings(tmp_path / "one", LEARNED, 2, bf16=True), data=mapped)
    ours = losses(read(two / "fsdp2-bf16"))
    assert ours[0] == pytest.approx(losses(one)[0], abs=1e-3) and ours[-1] < ours[0]
    assert any(float(torch.tensor(loss).bfloat16()) != pytest.approx(loss, abs=1e-5) for loss in ours)
    model = AutoModelForCausalLM.from_pretrained(two / "fsdp2-bf16" / "model")
    learned = model.model.layers[0].mixer.qkv_site.magnitude
    assert learned.dtype == torch.float32 and learned.item() != model.config.spike_magnitude


@pytest.mark.parametrize("name", CONFIGS)
def test_every_launch_config_is_one_that_accelerate_knows(name):
    config = load_config_from_file(str(LAUNCH / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == CONFIGS[name]
    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == SpikeLMDecoderLayer.__name__
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    if name == "zero3":
        assert config.deepspeed_config["zero_stage"] == 3 and config.deepspeed_config["zero3_save_16bit_model"]


def test_no_launch_config_is_left_out():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} == CONFIGS.keys()


def test_a_split_that_accelerate_would_leave_out_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="would train whole copies"):
        run(tiny_settings(tmp_path / "out"), data=tiny_data)


def test_a_checkpoint_of_another_engine_is_refused(tmp_path):
    out = tmp_path / "out"
    run(settings(out, PLAIN, 2), data=mapped)
    (out / "report.json").unlink()
    (out / "checkpoints" / "step-6" / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match="written by a run with FSDP2, this one has one whole model"):
        run(settings(out, PLAIN, 2), data=mapped)
