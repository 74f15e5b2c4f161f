"""Distillation: terms against their equations, document boundaries, the teacher's answers on disk, a whole run."""

from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, TrainingArguments

import spikelm
from small_models import SITES, small_model
from spikelm.recipes import distill
from spikelm.recipes.distill import DistillSettings, DistillTrainer
from spikelm.recipes.teacher import load_teacher, top_log_probs
from spikelm.recipes.teacher_cache import TeacherCache
from tests.conversion.tiny import llama

WINDOW = 12
FIELDS = {
    "out": "unused",
    "model": "unused",
    "teacher": "teacher",
    "data": {"window": WINDOW},
    "tokens": 96,
    "batch": 2,
    "micro_batch": 2,
    "checkpoints": 96,
}


def windows(count, seed=0):
    """Windows of two documents, the last of them with a part that does not count."""
    torch.manual_seed(seed)
    items = []
    for i in range(count):
        ids, first = torch.randint(0, 97, (WINDOW,)), 3 + i % 5
        positions = torch.cat([torch.arange(first), torch.arange(WINDOW - first)])
        labels = ids.masked_fill(positions == 0, -100)
        labels[-2:] = -100
        items.append({"input_ids": ids, "labels": labels, "position_ids": positions})
    return items


def batch(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def student(teacher, dtype=torch.float64):
    """A tiny student with the teacher's other half: two layers replaced, spikes."""
    model = small_model(dtype, mixers=["gla", "attention", "window_linear"], spike_sites=SITES, spike_dead_zone=0.3)
    assert model.config.vocab_size == teacher.config.vocab_size
    return model


@pytest.fixture
def teacher():
    return small_model(mixers="attention", num_hidden_layers=3)


@pytest.fixture
def make(teacher, tmp_path, monkeypatch):
    """A trainer of a student by settings; the teacher is loaded as it is, in float64."""

    def trainer(model=None, data=None, **fields):
        settings = DistillSettings(**FIELDS, **fields)
        monkeypatch.setattr(distill, "load_teacher", lambda source: teacher.eval().requires_grad_(False))
        arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True, disable_tqdm=True)
        return DistillTrainer(
            settings=settings, model=model or student(teacher), args=arguments, train_dataset=data or windows(4)
        )

    return trainer


def apart(model, item):
    """What a model says of the documents of a window, each alone: logits, layer outputs, mixer outputs `[T, C]`."""
    starts = [*(item["position_ids"] == 0).nonzero()[:, 0].tolist(), WINDOW]
    modules = [module for layer in model.model.layers for module in (layer, layer.mixer)]
    logits, outputs = [], [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
        for module, seen in zip(modules, outputs)
    ]
    for begin, end in pairwise(starts):
        logits.append(model(item["input_ids"][None, begin:end]).logits[0])
    for hook in hooks:
        hook.remove()
    whole = [torch.cat(seen) for seen in outputs]
    return torch.cat(logits), whole[0::2], whole[1::2]


def restated(ours, theirs, item, replaced):
    """The equations at the head of the recipe, one place after the other."""
    (logits, hidden, mixed), (t_logits, t_hidden, t_mixed) = apart(ours, item), apart(theirs, item)
    sums = dict.fromkeys(distill.TERMS, 0.0)
    for t in range(WINDOW - 1):
        if item["labels"][t + 1] == -100:
            continue
        q, p = logits[t].softmax(-1), t_logits[t].softmax(-1)
        sums["logits"] += (p * (p / q).log()).sum()
        sums["cross_entropy"] -= q[item["labels"][t + 1]].log()
        for layer in range(3):
            difference = hidden[layer][t] - t_hidden[layer][t]
            sums["hidden"] += (difference @ difference) / (t_hidden[layer][t] @ t_hidden[layer][t]) / 3
        for layer in replaced:
            sums["mixers"] += (mixed[layer][t] - t_mixed[layer][t]).pow(2).mean() / len(replaced)
    return sums


def test_terms_follow_their_equations_document_by_document(make, teacher):
    weights = {"logits": 1.0, "hidden": 0.5, "mixers": 2.0, "cross_entropy": 0.25}
    trainer, items = make(terms=weights), windows(3)
    with torch.no_grad():
        terms = trainer.token_losses(trainer.model, batch(items))
        expected = [restated(trainer.model, teacher, item, (0, 2)) for item in items]
    for name, weight in weights.items():
        assert abs(terms[name] - weight * sum(sums[name] for sums in expected)) < 1e-9, name


@pytest.mark.parametrize("term", distill.TERMS)
def test_each_term_stands_alone_and_its_gradient_is_that_of_its_equation(term, make, teacher):
    """Spikes off, where a gradient is one: straight-through ones are not derivatives."""
    model = small_model(mixers=["gla", "attention", "window_linear"])
    trainer, item = make(model=model, terms={term: 1.0}), windows(1)[0]
    terms = trainer.token_losses(model, batch([item]))
    assert list(terms) == [term]
    parameters = [p for name, p in model.named_parameters() if "layers.1" in name or "embed" in name]
    got = torch.autograd.grad(terms[term], parameters, allow_unused=True)
    wanted = torch.autograd.grad(restated(model, teacher, item, (0, 2))[term], parameters, allow_unused=True)
    for a, b in zip(got, wanted):
        assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-9 * (1 + b.abs().max()))


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}])
def test_windows_without_a_token_that_counts_weigh_nothing(fields, make):
    trainer, item = make(terms=dict.fromkeys(distill.TERMS, 1.0), **fields), windows(1)[0]
    terms = trainer.token_losses(trainer.model, batch([item | {"labels": torch.full((WINDOW,), -100)}]))
    sum(terms.values()).backward()
    assert list(terms.values()) == [0.0] * 4
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_the_teacher_neither_learns_nor_drops(make, teacher):
    trainer = make(terms={"logits": 1.0, "hidden": 1.0})
    sum(trainer.token_losses(trainer.model.train(), batch(windows(2))).values()).backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_top_k_of_the_whole_vocabulary_is_the_whole_divergence(make):
    whole, top, few = (make(**fields) for fields in ({}, {"top_k": 97}, {"top_k": 5}))
    inputs = batch(windows(2))
    full, kept, bound = (t.token_losses(whole.model, inputs)["logits"] for t in (whole, top, few))
    assert abs(kept - full) < 1e-9 and 0 < bound < full


@torch.no_grad()
def test_top_log_probs_hold_all_probability():
    model = small_model(logit_softcap=3.0)
    hidden = 9 * torch.randn(700, 32, dtype=torch.float64)
    ids, log_probs, rest = top_log_probs(hidden, model.lm_head, 5, 3.0)
    whole = (3 * (model.lm_head(hidden) / 3).tanh()).log_softmax(-1)
    assert torch.equal(whole.gather(1, ids), log_probs) and (whole.topk(5).values == log_probs).all()
    assert (log_probs.exp().sum(-1) + rest.exp() - 1).abs().max() < 1e-12
    assert top_log_probs(hidden, model.lm_head, 97, None)[2].isneginf().all()


def test_answers_on_disk_are_those_of_the_teacher(make, teacher, tmp_path):
    """With the whole vocabulary kept: the divergence of the stored (float16) distribution, and near the exact one."""
    items = windows(70)
    trainer = make(data=items, top_k=97, cache=str(tmp_path / "cache"))
    assert trainer.teacher is None and len(trainer.cache) == 70
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert [load_file(file)["ids"].shape for file in files] == [(64, WINDOW, 97), (6, WINDOW, 97)]
    inputs = batch(items[3:5])
    with torch.no_grad():
        kept = trainer.token_losses(trainer.model, inputs)["logits"]
        stored, total, entropy = load_file(files[0]), 0.0, 0.0
        for row, item in zip((3, 4), items[3:5]):
            logits = apart(trainer.model, item)[0]
            for t in (item["labels"][1:] != -100).nonzero()[:, 0].tolist():
                p = torch.zeros(97, dtype=torch.float64)
                p[stored["ids"][row, t].long()] = stored["log_probs"][row, t].double().exp()
                p /= p.sum()
                total += (p * (p.log() - logits[t].log_softmax(-1))).sum()
                entropy -= (p * p.log()).sum()
    assert abs(kept - total) < 1e-5 * total
    with torch.no_grad():
        exact = make().token_losses(trainer.model, inputs)["logits"]
    assert abs(kept - exact) < 2**-10 * entropy  # half a step of float16 per log p, and again for the scale


def test_a_cache_goes_on_where_it_stopped_and_asks_nobody_twice(teacher, tmp_path):
    items, asked = windows(130), []

    def load():
        asked.append(1)
        return teacher.eval()

    cache = TeacherCache(tmp_path, "teacher", 4)
    write = TeacherCache._write

    def killed(self, model, part):
        if self._files == 1:
            (self.folder / "00001.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(self, model, part)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TeacherCache, "_write", killed)
        cache.fill(load, items, progress=False)
    again = TeacherCache(tmp_path, "teacher", 4)
    assert len(again) == 64
    again.fill(load, [*items, *items[:9]], progress=False)
    assert len(again) == 130 and len(asked) == 2
    again.fill(load, reversed(items), progress=False)
    assert len(asked) == 2
    size = sum(file.stat().st_size for file in again.folder.glob("*.safetensors"))
    assert size == pytest.approx(130 * (WINDOW * again.bytes_per_token + 16), rel=0.02)
    with pytest.raises(ValueError, match="no answer"):
        again.answers(items[0]["input_ids"][None], items[0]["position_ids"][None] + 1)
    assert len(TeacherCache(tmp_path, "another", 4)) == 0 and len(TeacherCache(tmp_path, "teacher", 5)) == 0


def test_a_source_of_another_library_becomes_a_teacher_that_keeps_documents_apart(tmp_path):
    source = llama()
    source.save_pretrained(tmp_path)
    teacher, item = load_teacher(str(tmp_path)), windows(1)[0]
    with torch.no_grad():
        packed = teacher(item["input_ids"][None], position_ids=item["position_ids"][None]).logits[0]
        alone = torch.cat([source(part[None]).logits[0] for part in item["input_ids"].split([3, WINDOW - 3])])
    assert (packed - alone).abs().max() < 1e-4
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


WRONG = {
    "unknown": ({"terms": {"logit": 1.0}}, "terms has no 'logit'"),
    "nothing": ({"terms": {"logits": 0.0}}, "one of them above 0"),
    "negative": ({"terms": {"logits": 1.0, "hidden": -1.0}}, ">= 0"),
    "k": ({"top_k": 0}, "at least 1"),
    "cache": ({"cache": "here"}, "give top_k"),
    "hidden-cache": (
        {"cache": "here", "top_k": 4, "terms": {"logits": 1.0, "hidden": 1.0}},
        "hidden needs the teacher",
    ),
    "mixers-cache": ({"cache": "here", "top_k": 4, "terms": {"mixers": 1.0}}, "mixers needs the teacher"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillSettings(**FIELDS, **fields)


def test_the_shipped_settings_are_settings():
    settings = DistillSettings.read(Path(distill.__file__).with_name("distill.yaml"))
    assert settings.terms == {"logits": 1.0} and settings.steps * settings.batch * settings.window <= settings.tokens


def test_pairs_that_do_not_fit(make, teacher):
    with pytest.raises(ValueError, match="vocab_size 97, the student 98"):
        make(model=small_model(vocab_size=98))
    with pytest.raises(ValueError, match="hidden_size 32, the student 48"):
        make(model=small_model(hidden_size=48), terms={"hidden": 1.0})
    with pytest.raises(ValueError, match="no mixer differs"):
        make(model=small_model(spike_sites=SITES), terms={"mixers": 1.0})
    with pytest.raises(ValueError, match="top_k is 98"):
        make(top_k=98)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, the same model with spikes and noise on its weights, and texts of random letters, as folders."""
    torch.manual_seed(0)
    place, tokenizer = tmp_path_factory.mktemp("distill"), ByT5Tokenizer(extra_ids=0)
    common = {"dtype": torch.float32, "mixers": "attention", "vocab_size": len(tokenizer)}
    teacher = small_model(**common)
    spiking = small_model(**common, spike_sites=SITES, spike_dead_zone=0.6)
    spiking.load_state_dict({name: t + 0.1 * torch.randn_like(t) for name, t in teacher.state_dict().items()}, False)
    for name, model in {"teacher": teacher, "student": spiking}.items():
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "texts").mkdir()
    draw = Random(0)
    for i in range(4):
        (place / "texts" / f"{i}.txt").write_text("".join(draw.choices("abcdefghij", k=400)))
    return place


def run(folders, out, **changes):
    """The recipe from a YAML file to its report; steps of 4 windows of 32 bytes."""
    fields = {
        "model": str(folders / "student"),
        "teacher": str(folders / "teacher"),
        "data": {"sources": [{"files": f"{folders}/texts/*.txt"}], "window": 32, "heldout": ["3.txt"]},
        "batch": 4,
        "micro_batch": 4,
        "training": {"learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
    }
    fields["training"]["lr_scheduler_type"] = "constant"
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**fields, "checkpoints": changes["tokens"], "out": str(out), **changes}))
    return distill.train(file)


def test_the_recipe_brings_a_student_nearer_to_its_teacher(folders, tmp_path):
    report = run(folders, tmp_path / "live", tokens=128 * 10)
    losses = [row["loss"] for row in report["losses"]]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert report["heldout_losses"][-1]["loss"] < losses[0]
    trained = spikelm.SpikeLMForCausalLM.from_pretrained(tmp_path / "live" / "model")
    assert trained.config.is_spiking
    # The same first step with answers from disk: all of the vocabulary, rounded to float16.
    kept = run(folders, tmp_path / "disk", tokens=128, top_k=259, cache=str(tmp_path / "cache"))
    assert kept["losses"][0]["loss"] == pytest.approx(losses[0], rel=2e-3)
