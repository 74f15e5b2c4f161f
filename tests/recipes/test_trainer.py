"""What a step minimises, however it is split; what is logged; what stops a run."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from spikelm import SpikeLMForCausalLM, SpikeStatistics, spike_groups
from spikelm.recipes.run import load, run, training_arguments
from spikelm.recipes.trainer import Filled, RecipeTrainer, counting, shifted
from tests.recipes.tiny_run import WINDOW, Data, Windows, tiny_data, tiny_settings


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.kept = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if self.kept is None:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters()}


def one_step(out, micro_batch, dtype=torch.float64, trainer=RecipeTrainer, **training):
    """Gradients of a step of 16 windows without clipping, and the model as it was before."""
    settings = tiny_settings(out, batch=16, micro_batch=micro_batch, tokens=16 * WINDOW)
    config = settings.config | {"residual_dropout": 0.0}
    training = settings.training | {"max_grad_norm": 0.0, "logging_steps": 1} | training
    settings, gradients = replace(settings, config=config, training=training), Gradients()
    report = run(settings, trainer, lambda model, *_: model.to(dtype), tiny_data, [gradients])
    torch.manual_seed(settings.seed)
    return gradients.kept, load(settings)[0].to(dtype), report


def batch(count=16):
    items = [Windows(count, seed=1)[i] for i in range(count)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_a_step_has_the_gradient_of_the_mean_over_its_tokens(tmp_path):
    inputs = batch()
    for micro_batch in (16, 4, 1):
        ours, model, report = one_step(tmp_path / str(micro_batch), micro_batch)
        if micro_batch == 16:
            logits = model.train()(inputs["input_ids"], position_ids=inputs["position_ids"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
            loss.backward()
        assert report["losses"][0]["loss"] == pytest.approx(loss.item(), abs=1e-6)  # Trainer sums up in float32
        for name, parameter in model.named_parameters():
            if micro_batch == 16:
                expected = {name: p.grad for name, p in model.named_parameters()}
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
            assert parameter.shape == ours[name].shape


def test_in_float32_too_and_by_logits_as_by_hidden_states(tmp_path):
    class ByLogits(RecipeTrainer):
        fused = False

    one, *_ = one_step(tmp_path / "1x16", 16, torch.float32)
    for name, given in {"4x4": (4, torch.float32), "logits": (16, torch.float32, ByLogits)}.items():
        other, *_ = one_step(tmp_path / name, *given)
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-6)


def test_bfloat16_is_autocast_over_float32_weights(tmp_path):
    wide, *_ = one_step(tmp_path / "float32", 16, torch.float32)
    narrow, _, report = one_step(tmp_path / "bf16", 16, torch.float32, bf16=True)
    for key in wide:
        assert narrow[key].dtype == torch.float32
    apart = sum((narrow[key] - wide[key]).square().sum() for key in wide).sqrt()
    size = sum(wide[key].square().sum() for key in wide).sqrt()
    assert 1e-4 < apart / size < 0.2
    saved = load_file(tmp_path / "bf16" / "model" / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values()) and report["losses"][0]["loss"] > 0


def test_targets_are_the_next_labels():
    labels = torch.tensor([[-100, 5, 6, -100], [1, 2, 3, 4]])
    assert shifted(labels).tolist() == [[5, 6, -100, -100], [2, 3, 4, -100]]
    assert torch.equal(counting(labels), shifted(labels)[:, :-1] != -100)


class TwoTerms(RecipeTrainer):
    """Two weighted terms."""

    def token_losses(self, model, inputs):
        (loss,) = super().token_losses(model, inputs).values()
        return {"cross_entropy": 0.75 * loss, "other": 0.25 * loss}


def test_terms_are_added_and_logged(tmp_path):
    out = tmp_path / "two"
    report = run(tiny_settings(out), TwoTerms, data=tiny_data)
    single = run(tiny_settings(tmp_path / "one"), data=tiny_data)
    assert [p["loss"] for p in report["losses"]] == pytest.approx([p["loss"] for p in single["losses"]], rel=1e-4)
    state = json.loads((out / "checkpoints" / "step-12" / "trainer_state.json").read_text())
    for row in state["log_history"]:
        if "loss" in row:
            assert row["cross_entropy"] + row["other"] == pytest.approx(row["loss"], rel=1e-5)
            assert row["other"] == pytest.approx(row["loss"] / 4, rel=1e-5)
        else:
            assert row["eval_other"] == pytest.approx(row["eval_loss"] / 4, rel=1e-5)


def test_heldout_loss_is_the_mean_over_tokens_of_all_windows(tmp_path):
    settings = tiny_settings(tmp_path / "out", micro_batch=2)  # five windows: the last batch is filled up
    report = run(settings, data=tiny_data)
    model = SpikeLMForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    total, tokens = 0.0, 0
    for item in (Windows(5, seed=2)[i] for i in range(5)):
        logits = model(item["input_ids"][None], position_ids=item["position_ids"][None]).logits[0, :-1]
        total += F.cross_entropy(logits, item["labels"][1:], reduction="sum").item()
        tokens += counting(item["labels"][None]).sum().item()
    assert report["heldout_losses"][-1]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    best = min(report["heldout_losses"], key=lambda point: point["loss"])
    assert report["best"] == best


def test_filled_up_windows_carry_no_label():
    filled = Filled(Windows(5, seed=2), 4)
    assert len(filled) == 8
    assert all(counting(filled[i]["labels"][None]).any() for i in range(5))
    assert not any(counting(filled[i]["labels"][None]).any() for i in range(5, 8))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_spikes_are_those_of_one_micro_batch(tmp_path, checkpointing):
    _, model, _ = one_step(tmp_path / "out", 4, torch.float32, activation_checkpointing=checkpointing)
    state = json.loads((tmp_path / "out" / "checkpoints" / "step-1" / "trainer_state.json").read_text())
    first, inputs = state["log_history"][0], batch(4)
    with SpikeStatistics(model) as statistics:
        model(inputs["input_ids"], position_ids=inputs["position_ids"])
    summary = statistics.summary()
    assert first["silent_share_reads"] == pytest.approx(summary["silent_share_reads"], rel=1e-3)
    assert first["silent_share"] == pytest.approx(summary["silent_share"], rel=1e-3)
    assert first["firing_rate_unary"] == pytest.approx(summary["firing_rate"]["unary"], rel=1e-3)
    assert not any(group.site.observers for group in statistics.groups)


def test_sites_that_code_nothing_are_no_metric(tmp_path):
    def silenced(model, *_):
        for group in spike_groups(model):
            group.site.substitute = lambda x: x
        return model

    report = run(tiny_settings(tmp_path / "out", tokens=4 * WINDOW), prepare=silenced, data=tiny_data)
    assert report["steps"] == 1


class Stateful(TrainerCallback, ExportableState):
    """Counts steps, and asks for a checkpoint at a step that has none."""

    def __init__(self):
        self.steps = 0

    def state(self):
        return {"args": {}, "attributes": {"steps": self.steps}}

    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        control.should_save = state.global_step == 5


def test_callbacks_keep_their_state_and_may_ask_for_a_checkpoint(tmp_path):
    settings, callbacks = tiny_settings(tmp_path / "out"), [Stateful(), Stateful()]
    with pytest.raises(FloatingPointError, match="The checkpoint of step 5 is whole"):
        run(settings, Broken, data=tiny_data, callbacks=callbacks[:1])
    run(settings, data=tiny_data, callbacks=callbacks[1:])
    assert callbacks[1].steps == 12
    state = json.loads((tmp_path / "out" / "checkpoints" / "step-12" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [3, 4, 5, 6, 8, 9, 12]


class Broken(RecipeTrainer):
    """Its sixth step is not finite: the loss, or its gradient alone."""

    gradient = False

    def token_losses(self, model, inputs):
        (loss,) = super().token_losses(model, inputs).values()
        if self.state.global_step == 5 and self.is_in_train:
            loss = loss + (loss - loss.detach()).abs().sqrt() if self.gradient else loss * float("nan")
        return {"cross_entropy": loss}


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_is_kept(tmp_path, gradient, monkeypatch):
    monkeypatch.setattr(Broken, "gradient", gradient)
    with pytest.raises(FloatingPointError, match=r"Step 6: the .* is nan. The checkpoint of step 4 is whole"):
        run(tiny_settings(tmp_path / "out"), Broken, data=tiny_data)
    report = run(tiny_settings(tmp_path / "out"), data=tiny_data)
    assert report["steps"] == 12 and all(point["loss"] < 10 for point in report["losses"])


def test_matrices_decay_and_nothing_else(tmp_path):
    seen = {}

    class Looking(RecipeTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            for group in self.optimizer.param_groups:
                seen[group["weight_decay"]] = [p.ndim for p in group["params"]]
            return optimizer

    one_step(tmp_path / "out", 16, trainer=Looking, weight_decay=0.1)
    assert set(seen) == {0.0, 0.1} and min(seen[0.1]) == 2 and max(seen[0.0]) == 1


def test_the_result_is_a_complete_model_folder_and_a_bar_shows_the_way(tmp_path, capsys):
    out = tmp_path / "out"
    settings = tiny_settings(out)
    report = run(replace(settings, training=settings.training | {"disable_tqdm": False}), data=tiny_data)
    assert re.search(r"12/12 .*it/s, [\d,]+ tokens/s, \d+\.\d% silent", capsys.readouterr().err)
    names = {path.name for path in (out / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= names
    assert SpikeLMForCausalLM.from_pretrained(out / "model").config.use_cache
    assert report["tokens"] == 12 * 4 * WINDOW and report["tokens_per_second"] > 0
    assert {"spikelm", "torch", "transformers", "accelerate"} == set(report["versions"])
    assert report["settings"]["seed"] == 0 and report["load_average"] >= 0 and report["data"] == {"windows": 48}
    # It goes on from there, with another configuration.
    longer = tiny_settings(
        tmp_path / "longer", model=str(out / "model"), tokenizer=None, config={"attention_window": 8}
    )
    assert load(longer)[0].config.attention_window == 8
    assert run(longer, data=tiny_data)["losses"][0]["loss"] < report["losses"][0]["loss"]


def test_without_held_out_text_there_is_no_best(tmp_path):
    report = run(tiny_settings(tmp_path / "out"), data=lambda *_: Data(Windows(4, seed=1), None))
    assert report["heldout_losses"] == [] and report["best"] is None


def test_several_processes_must_share_a_batch_evenly(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch \(4\) must be a multiple of micro_batch \(2\) times processes \(3\)"):
        training_arguments(tiny_settings(tmp_path / "out"))
