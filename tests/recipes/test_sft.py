"""Chats: which tokens carry loss, against examples written by hand; templates that do not say it are refused."""

import json
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from small_models import small_model
from small_tokenizer import letters
from spikelm.recipes import sft
from spikelm.recipes.chats import ChatEncoder
from spikelm.recipes.data import DataSettings
from spikelm.recipes.settings import Settings
from spikelm.recipes.sft import load_chats

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": " Yes?\n"},
    {"role": "user", "content": "Hi again, Hi"},
    {"role": "assistant", "content": "Hi"},
]
CHATML = (
    "{% for m in messages %}{{ '{' + m['role'] + '|' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant|' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '{' + m['role'] + '|' }}{% if m['role'] == 'assistant' %}"
    "{%- generation -%}{{ m['content'] + '<eos>' }}{%- endgeneration -%}{% else %}{{ m['content'] + '<eos>' }}"
    "{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
# In the style of Llama 2: nothing announces an answer, it follows the question.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' <eos>' }}"
    "{% else %}{{ '[' + m['content'] + ']' }}{% endif %}{% endfor %}"
)
UNANNOUNCED = "{% for m in messages %}{{ '{' + m['role'] + '|' + m['content'] + '<eos>\n' }}{% endfor %}"
# In the style of models that think: what is said of an answer depends on whether it is the last one.
FORGETFUL = (
    "{% for m in messages %}{{ '{' + m['role'] + '|' }}{% if loop.last and m['role'] == 'assistant' %}{{ '()' }}"
    "{% endif %}{{ m['content'] + '<eos>' }}{% endfor %}{% if add_generation_prompt %}{{ '{assistant|' }}{% endif %}"
)
SILENT = (
    "{% for m in messages %}{{ '{' + m['role'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{assistant|' }}{% endif %}"
)


def chatting(template):
    tokenizer = letters()
    tokenizer.chat_template = template
    return tokenizer


def learned(template, chat=CHAT):
    """The text of the learned tokens; `_` for each of the others."""
    tokenizer = chatting(template)
    (document,) = ChatEncoder(tokenizer)([chat])
    text = [tokenizer.decode([i]) for i in document.ids]
    assert "".join(text) == tokenizer.apply_chat_template(chat, tokenize=False)
    return "".join(t if on else "_" for t, on in zip(text, document.learned))


def blank(text):
    return "_" * (len(text) - 4 * text.count("<eos>"))  # <eos> is one token


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_are_learned_with_the_token_that_ends_them_and_nothing_else(template):
    first, second = "{system|Be brief.<eos>\n{user|Hi<eos>\n{assistant|", "\n{user|Hi again, Hi<eos>\n{assistant|"
    assert learned(template) == f"{blank(first)} Yes?\n<eos>{blank(second)}Hi<eos>_"


def test_answers_that_nothing_announces():
    assert learned(BRACKETS) == f"{blank('[Be brief.][Hi]')} Yes? <eos>{blank('[Hi again, Hi]')} Hi <eos>"


def test_an_answer_that_repeats_the_question_or_the_names_of_roles():
    chat = [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": "assistant"}]
    assert learned(CHATML, chat) == f"{blank('{user|assistant<eos>+{assistant|')}assistant<eos>_"


@pytest.mark.parametrize(
    ("template", "said"),
    [(UNANNOUNCED, "does not say"), (FORGETFUL, "does not say"), (SILENT, "leaves out or changes"), (None, "no chat")],
)
def test_templates_that_do_not_tell_answers_apart_are_refused(template, said):
    with pytest.raises(ValueError, match=said):
        learned(template)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ("Hi", "list of messages"),
        ([], "list of messages"),
        ([{"role": "user"}], "message 0 must have"),
        (CHAT[2:], "begins with the assistant"),
        (CHAT[:2], "no token of the chat"),
    ],
)
def test_chats_without_an_answer_to_learn_are_refused(chat, said):
    with pytest.raises(ValueError, match=said):
        learned(CHATML, chat)


def settings(folder, **data):
    data = {"sources": [{"files": str(folder / "*.jsonl")}], "window": 64, **data}
    return Settings(out="o", data=data, tokens=64, batch=1, micro_batch=1, checkpoints=64, model="m")


def test_chats_share_windows_whole(tmp_path, cache):
    for name, count in (("a", 5), ("b", 1)):
        chats = [[{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a" * n}] for n in range(1, 6)]
        rows = [json.dumps({"messages": chat}) + "\n" for chat in chats[:count]]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    tokenizer = chatting(CHATML)
    data = load_chats(settings(tmp_path, heldout=["b.jsonl"]), tokenizer)
    texts = []
    for item in (data.train[i] for i in range(len(data.train))):
        assert [tokenizer.decode(i) for i in item["input_ids"][item["labels"] != -100]].count("q") == 0
        texts.append(tokenizer.decode(item["input_ids"][item["labels"] != -100]))
        begins = item["position_ids"].eq(0).nonzero()[:, 0].tolist()
        assert all(tokenizer.decode(item["input_ids"][i]) in ("{", "<eos>") for i in begins)
    assert sorted("".join(texts).split("<eos>")[:-1]) == ["a" * n for n in range(1, 6)]
    item = data.heldout[0]
    assert tokenizer.decode(item["input_ids"][item["labels"] != -100]) == "a<eos>"


def test_mistakes_in_chats_name_the_file(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": "Hi"}) + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl: a list of messages"):
        load_chats(settings(tmp_path), chatting(CHATML))
    with pytest.raises(ValueError, match="leave it out"):
        load_chats(settings(tmp_path, end_of_text="<eos>"), chatting(CHATML))


def test_the_recipe_trains_on_answers_and_the_shipped_file_fits(tmp_path, cache):
    model, tokenizer = small_model(torch.float32, vocab_size=98, mixers="gla"), chatting(CHATML)
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    fields = {
        "model": str(tmp_path / "model"),
        "out": str(tmp_path / "out"),
        "data": {"sources": [{"files": str(tmp_path / "*.jsonl")}], "window": 96, "heldout": ["b.jsonl"]},
        **{"tokens": 5 * 96, "batch": 1, "micro_batch": 1, "checkpoints": 5 * 96},
        "training": {"use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "logging_steps": 1},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(fields))
    report = sft.train(tmp_path / "sft.yaml")
    (document,) = ChatEncoder(tokenizer)([CHAT])
    with torch.no_grad():
        logits = model(torch.from_numpy(document.ids)[None]).logits[0, :-1]
    learned = torch.from_numpy(document.learned)[1:]
    by_hand = F.cross_entropy(logits[learned], torch.from_numpy(document.ids)[1:][learned])
    assert report["losses"][0]["loss"] == pytest.approx(by_hand.item(), abs=1e-4)
    assert report["losses"][-1]["loss"] < 0.9 * report["losses"][0]["loss"]
    assert report["heldout_losses"][-1]["loss"] < report["losses"][0]["loss"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config.mixers == ["gla"] * 3

    shipped = Settings.read(str(files("spikelm.recipes") / "sft.yaml"))
    assert DataSettings.of(shipped.data).window == 1024 and shipped.steps > 100
