"""Chats as documents: the tokenizer's chat template renders them, loss falls on the assistant's answers alone.

    <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n
                                                             ------------------      learned

An answer is what the model itself has to write: from behind the generation prompt up to and with the token that ends
the turn. A template may mark it (`{% generation %}`); without marks it is found by rendering: the chat before an answer
with a generation prompt, and the chat up to its end, must both be beginnings of the whole text.
"""

import re
from typing import Any

import numpy as np

from spikelm.recipes.documents import Document, digest, tokenizer_key

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Turns lists of messages, `{"role", "content"}` each, into documents.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template.

    Raises:
        ValueError: no chat template, or no offsets.
    """

    field = "messages"
    masks = True
    ends_with = None  # the template says how a chat ends

    def __init__(self, tokenizer: Any):
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: give a model that was tuned on chats, or set one.")
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no offsets of tokens: a fast tokenizer is needed.")
        self.tokenizer = tokenizer
        self._marked = bool(_MARKED.search(str(tokenizer.chat_template)))
        self.key = f"chats {tokenizer_key(tokenizer)} {digest(str(tokenizer.chat_template))}"

    def __call__(self, chats: list[Any]) -> list[Document]:
        """A document per chat. Raises ValueError where it cannot be said which tokens are an answer."""
        return [self._encoded(_messages(chat)) for chat in chats]

    def _encoded(self, messages: list[dict[str, Any]]) -> Document:
        if self._marked:
            both = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, learned = both["input_ids"], np.asarray(both["assistant_masks"], bool)
        else:
            text, spans = self._answers(messages)
            both = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, learned = both["input_ids"], _inside(np.asarray(both["offset_mapping"]), spans)
        if not learned.any():
            raise ValueError("no token of the chat is an answer of the assistant.")
        return Document(np.asarray(ids, np.int64), learned)

    def _answers(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The chat as text, and where its answers begin and end in it."""
        text, spans = self._rendered(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not i:
                raise ValueError("the chat begins with the assistant; expected a system or user message first.")
            plain = self._rendered(messages[:i])
            before = self._rendered(messages[:i], add_generation_prompt=True)
            through = self._rendered(messages[: i + 1])
            written = through[len(before) :]
            announced = before != plain or written.lstrip().startswith(message["content"].strip())
            if not (text.startswith(through) and through.startswith(before) and announced):
                raise ValueError(
                    "the chat template does not say which tokens are the assistant's: the text before an answer "
                    "changes when the answer comes. Mark answers in it with {% generation %}."
                )
            if message["content"].strip() not in written:
                raise ValueError(f"the chat template leaves out or changes what the assistant says in message {i}.")
            spans.append((len(before), len(before) + len(self._to_the_end(written))))
        return text, spans

    def _to_the_end(self, written: str) -> str:
        """Without the white space that a template puts behind the token that ends a turn."""
        stripped = written.rstrip()
        return stripped if stripped.endswith(tuple(self.tokenizer.all_special_tokens)) else written

    def _rendered(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)


def _messages(chat: Any) -> list[dict[str, Any]]:
    if not isinstance(chat, list) or not chat:
        raise ValueError(f"a list of messages was expected, got {type(chat).__name__}.")
    for i, message in enumerate(chat):
        told = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        if not told:
            raise ValueError(f"message {i} must have a role and a content, both texts; got {message!r}.")
    return chat


def _inside(offsets: Any, spans: list[tuple[int, int]]) -> Any:
    """`[tokens]` bool: which tokens, of offsets `[tokens, 2]`, lie within one of the spans and are not empty."""
    begin, end = offsets[:, 0], offsets[:, 1]
    learned: Any = np.zeros(len(offsets), bool)
    for first, last in spans:
        learned |= (begin >= first) & (end <= last) & (begin < end)
    return learned
