"""The part `tasks`: bundled and local tasks by hand and through the harness, paired errors, failures; all offline."""

import importlib.util
import json
import math
import random
import re
import statistics
from pathlib import Path

import datasets
import pytest
import torch

from report_keys import documented_keys, written_keys
from small_models import SITES, small_model
from spikelm.conversion.texts import calibration_sample
from spikelm.eval import bundled_tasks, harness, tasks
from spikelm.eval.bundled_tasks import BUNDLED
from spikelm.eval.evaluate import evaluate, failed
from spikelm.eval.paired import combined, errors
from spikelm.eval.parts import Subject

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
EXACT = 1e-6


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Data sets are kept in a folder of the test, and no hub is asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(harness, "_answers", lambda address: False)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """The folder of the example in docs/evaluation.md, and the folder that it is called in."""
    yaml = re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1]
    lines = re.search(r"`spikes.jsonl`:\n\n```\n(.*?)```", PAGE, re.S)[1]
    (tmp_path / "spikes.yaml").write_text(yaml)
    (tmp_path / "spikes.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model, baseline, tokenizer, prose, out=None, **settings):
    return evaluate(
        model, baseline, tokenizer, [prose], parts=["tasks"], settings={"tasks": settings}, progress=False, out=out
    )


def row(report, task, metric):
    return next(row for row in report["tasks"]["rows"] if (row["task"], row["metric"]) == (task, metric))


@pytest.fixture
def both(make_pair):
    return make_pair(num_hidden_layers=1, max_position_embeddings=4096)


def logprob(model, tokenizer, context, text):
    """log p(text | context), one token per character; without a context behind the begin-of-text token."""
    start = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
    ids = torch.tensor([start + tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logp = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logp[len(start) - 1 :].sum().item()


def test_numbers_equal_a_computation_by_hand(both, tokenizer, prose):
    model, baseline = both
    report = run(model, baseline, tokenizer, prose, limit=3)
    assert not failed(report)
    for name, network in (("model", model), ("baseline", baseline)):
        texts = [document["text"] for document in bundled_tasks.prose()[:3]]
        nats = [-logprob(network, tokenizer, "", text[:2048]) for text in texts]
        for i, text in enumerate(texts):  # the second window is filled up with what is known
            if len(text) > 2048:
                nats[i] -= logprob(network, tokenizer, text[-2049:2048], text[2048:])
        assert max(map(len, texts)) > 2048
        size = sum(len(text.encode()) for text in texts)
        assert row(report, "spikelm_prose", "bits_per_byte")["value"][name] == pytest.approx(
            sum(nats) / size / math.log(2), abs=EXACT
        )
        hits, normed = [], []
        for document in bundled_tasks.next_sentence()[:3]:
            totals = [logprob(network, tokenizer, document["text"], choice) for choice in document["choices"]]
            means = [total / len(choice) for total, choice in zip(totals, document["choices"])]
            hits.append(totals.index(max(totals)) == document["answer"])
            normed.append(means.index(max(means)) == document["answer"])
        assert row(report, "spikelm_next_sentence", "acc")["value"][name] == pytest.approx(sum(hits) / 3)
        assert row(report, "spikelm_next_sentence", "acc_norm")["value"][name] == pytest.approx(sum(normed) / 3)
        totals = [logprob(network, tokenizer, one["text"], one["word"]) for one in bundled_tasks.last_word()[:3]]
        perplexity = row(report, "spikelm_last_word", "perplexity")["value"][name]
        assert math.log(perplexity) == pytest.approx(-sum(totals) / 3, abs=EXACT)


def test_a_model_that_can_do_it_gets_all_of_it(both, tokenizer, prose, monkeypatch):
    """Accuracies are not just zero: the answers of a model that knows them are found."""

    def knows(self, requests, *args, **kwargs):
        found = []
        for request in requests:
            text, choice = request.args
            right = any(one["text"] == text and one["choices"][one["answer"]] == choice for one in known)
            found.append((-1.0 if right else -2.0 * len(choice), right))
        return found

    from spikelm.eval.lm_eval_model import SpikeLM

    known = bundled_tasks.next_sentence()
    keys = {document["text"]: document["key"] for document in bundled_tasks.passkey()}
    monkeypatch.setattr(SpikeLM, "loglikelihood", knows)
    monkeypatch.setattr(SpikeLM, "generate_until", lambda self, requests: [f" {keys[r.args[0]]}, or" for r in requests])
    report = run(*both, tokenizer, prose, limit=8, tasks=["spikelm_next_sentence", "spikelm_passkey"])
    for task, metric in (("spikelm_next_sentence", "acc"), ("spikelm_passkey", "exact_match")):
        found = row(report, task, metric)
        assert found["value"] == {"model": 1, "baseline": 1} and found["value_error"]["model"] == 0


def test_differences_are_paired_over_documents(make_pair, tokenizer, prose):
    model, baseline = make_pair(num_hidden_layers=1, max_position_embeddings=4096)
    report = run(model, baseline, tokenizer, prose, limit=6, tasks=["spikelm_last_word"])
    found = row(report, "spikelm_last_word", "perplexity")
    documents = bundled_tasks.last_word()[:6]
    one, other = ([-logprob(m, tokenizer, d["text"], d["word"]) for d in documents] for m in (model, baseline))

    def left_out(values):
        return [math.exp(sum(values[:i] + values[i + 1 :]) / 5) for i in range(6)]

    difference = [a - b for a, b in zip(left_out(one), left_out(other))]
    expected = math.sqrt(5 * statistics.pvariance(difference))
    assert found["difference"] == pytest.approx(math.exp(sum(one) / 6) - math.exp(sum(other) / 6), rel=EXACT)
    assert found["difference_error"] == pytest.approx(expected, rel=EXACT)
    again = run(model, model, tokenizer, prose, limit=6, tasks=["spikelm_last_word"])
    found = row(again, "spikelm_last_word", "perplexity")
    assert found["difference"] == found["difference_error"] == 0 < found["value_error"]["model"]


def test_errors_of_a_mean_are_the_usual_ones():
    draw = random.Random(0)
    one, other = ([draw.random() for _ in range(50)] for _ in range(2))

    def mean(values):
        return sum(values) / len(values)

    own, paired = errors(mean, one, other)
    assert own == pytest.approx([statistics.stdev(values) / math.sqrt(50) for values in (one, other)])
    assert paired == pytest.approx(statistics.stdev(a - b for a, b in zip(one, other)) / math.sqrt(50))
    assert errors(mean, one)[1] is None and errors(mean, [1.0]) == ([None], None)
    many = [draw.random() for _ in range(5000)]
    assert errors(mean, many)[0][0] == pytest.approx(statistics.stdev(many) / math.sqrt(5000), rel=0.1)
    assert combined([3.0, 4.0], [0.5, 0.5]) == 2.5 and combined([1.0, None], [0.5, 0.5]) is None


def test_the_example_of_the_page_runs(both, tokenizer, prose, local):
    model, baseline = both
    report = run(model, baseline, tokenizer, prose, tasks=["spikes"], include_path=[str(local)])
    assert not failed(report)
    found = row(report, "spikes", "acc")
    assert (found["documents"], found["available"], found["data"], found["version"]) == (2, 2, "json", "1.0")
    documents = [json.loads(line) for line in (local / "spikes.jsonl").read_text().splitlines()]
    hits = []
    for document in documents:
        totals = [logprob(model, tokenizer, document["question"], f" {choice}") for choice in document["choices"]]
        hits.append(totals.index(max(totals)) == document["answer"])
    assert found["value"]["model"] == pytest.approx(sum(hits) / 2)


def test_groups_are_means_of_their_tasks(both, tokenizer, prose, local):
    (local / "two.yaml").write_text((local / "spikes.yaml").read_text().replace("task: spikes", "task: two"))
    (local / "group.yaml").write_text(
        "group: pair\ntask: [spikes, two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    report = run(*both, tokenizer, prose, tasks=["pair"], include_path=[str(local)])
    assert not failed(report)
    group, parts = row(report, "pair", "acc"), [row(report, name, "acc") for name in ("spikes", "two")]
    assert group["kind"] == "group" and group["documents"] == 4
    assert group["value"] == parts[0]["value"] == parts[1]["value"]  # twice the same task
    assert group["value_error"]["model"] == pytest.approx(parts[0]["value_error"]["model"] / math.sqrt(2))


def test_shots_come_from_the_task_unless_it_says_none(both, tokenizer, prose, local):
    report = run(*both, tokenizer, prose, tasks=["spikes"], include_path=[str(local)], shots=1)
    assert row(report, "spikes", "acc")["shots"] == 0
    free = (local / "spikes.yaml").read_text().replace("num_fewshot: 0\n", "fewshot_split: test\n")
    (local / "spikes.yaml").write_text(free)
    default, one = (
        run(*both, tokenizer, prose, tasks=["spikes"], include_path=[str(local)], shots=shots) for shots in (None, 1)
    )
    assert row(default, "spikes", "acc")["shots"] == 0 and row(one, "spikes", "acc")["shots"] == 1
    assert one["tasks"]["tokens"]["model"] > default["tasks"]["tokens"]["model"]


def test_names_that_there_are_not_end_in_one_line(both, tokenizer, prose, local, monkeypatch):
    monkeypatch.setattr(harness, "_builtin", lambda: ("hellaswag", "arc_easy"))
    cases = {
        "There is no task 'spike'. Did you mean spikes": {"tasks": ["spike"], "include_path": [str(local)]},
        "Without a download: spikelm_prose, spikelm_next_sentence": {"tasks": ["spikelm_poetry"]},
        "Did you mean hellaswag?": {"tasks": ["helaswag"]},
        "'/nowhere' is not a folder": {"include_path": ["/nowhere"]},
        "No task was asked for": {"tasks": []},
        "lists of names and of folders; got 'spikelm_prose'": {"tasks": "spikelm_prose"},
        "limit of the tasks must be at least 1; got 0": {"limit": 0},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            run(*both, tokenizer, prose, **settings)
        assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_fails_the_part_at_once(both, tokenizer, prose):
    report = run(*both, tokenizer, prose, tasks=["arc_easy"])
    (line,) = failed(report)
    assert "ConnectionError: The documents of 'arc_easy' are not on this machine" in line
    assert "cannot be reached. Without a download: spikelm_prose" in line or "HF_HUB_OFFLINE is set" in line
    assert "\n" not in line and report["tasks"] is None


def test_a_task_that_cannot_be_loaded_is_named(both, tokenizer, prose, local):
    (local / "spikes.yaml").write_text((local / "spikes.yaml").read_text().replace("multiple_choice", "poetry"))
    (line,) = failed(run(*both, tokenizer, prose, tasks=["spikes"], include_path=[str(local)]))
    assert "The task 'spikes' cannot be loaded: ValueError: Got invalid output_type 'poetry'" in line
    (local / "spikes.jsonl").unlink()
    (local / "spikes.yaml").write_text((local / "spikes.yaml").read_text().replace("poetry", "multiple_choice"))
    (line,) = failed(run(*both, tokenizer, prose, tasks=["spikes"], include_path=[str(local)]))
    assert "The documents of 'spikes' are not on this machine" in line and "spikes.jsonl" in line


def test_without_the_harness_the_part_is_left_out(both, tokenizer, prose, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    report = run(*both, tokenizer, prose, out=tmp_path)
    assert report["parts"][0]["status"] == "left out"
    assert "pip install 'spikelm[eval]'" in (tmp_path / "report.md").read_text()


def test_the_documented_keys_are_the_written_keys_and_the_page_shows_them(both, tokenizer, prose, tmp_path, capfd):
    out = tmp_path / "out"
    report = run(*both, tokenizer, prose, out=out, limit=2)
    shown = capfd.readouterr()
    assert shown.out == shown.err == ""  # the harness itself prints a page

    assert written_keys(report["tasks"], "tasks") == documented_keys("tasks")
    page = (out / "report.md").read_text(encoding="utf-8")
    for task in BUNDLED:
        assert f"| {task} | 2 of " in page
    assert "behind `<s>`" in page and "nan" not in page and "None" not in page.split("## Measured on")[0]
    summary = tasks.PART.summary(report["tasks"])
    assert summary["spikelm_passkey: exact_match (digits)"] == "0 ± 0"


def test_without_a_baseline_and_with_neurons(tokenizer, prose, tmp_path):
    model = small_model(torch.float32, mixers="gla", spike_sites=SITES, spike_neuron="lif", spike_code="binary")
    report = run(model, None, tokenizer, prose, out=tmp_path, limit=1, tasks=["spikelm_last_word"])
    found = row(report, "spikelm_last_word", "acc")
    assert found["value"]["baseline"] is found["difference"] is found["difference_error"] is None
    assert found["value_error"]["model"] is None  # one document
    assert report["tasks"]["window"] == 128 and report["tasks"]["tokens"]["baseline"] is None
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "difference" not in page.split("## Measured on")[0].split("±")[0] and "1 requests were longer" in page


def test_the_bar_moves_by_what_the_part_said_it_costs(both, tokenizer, prose):
    class Bar:
        n, disable = 0.0, True

        def update(self, tokens):
            self.n += tokens

    bar, settings = Bar(), tasks.Settings(limit=2, window=4096)  # no text is longer: nothing is read twice
    subject = Subject(*both, tokenizer, [prose], prose)
    tasks.PART.run(subject, settings, bar, {})
    # The last token is not read; a continuation may end early.
    assert bar.n == pytest.approx(tasks.PART.cost(subject, settings), rel=0.05)


def test_random_numbers_of_others_are_left_alone(both, tokenizer, prose):
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    run(*both, tokenizer, prose, limit=1, tasks=["spikelm_last_word"])
    assert (random.random(), torch.rand(1).item()) == expected


def test_nothing_is_measured_that_is_calibrated_on():
    calibration = " ".join(calibration_sample().split())
    found = bundled_tasks.paragraphs()
    assert len(found) > 100 and not [paragraph for paragraph in found if paragraph in calibration]
    answers = [document["answer"] for document in bundled_tasks.next_sentence()]
    assert all(answers.count(i) > len(answers) / 8 for i in range(4))
    for document in bundled_tasks.passkey():
        assert document["text"].count(document["key"]) == 1
