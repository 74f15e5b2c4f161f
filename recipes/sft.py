"""Supervised fine-tuning on chats: loss on the assistant's answers only.

    spikelm train sft recipes/sft.yaml
    accelerate launch -m spikelm.recipes.sft recipes/sft.yaml

Rows of .jsonl, .parquet or a hub dataset hold `messages`. The tokenizer's chat template renders them (`chats.py`), and
several chats share a window without seeing each other. Unless `data.documents` says otherwise, a chat stays whole.
"""

from pathlib import Path
from typing import Any

from spikelm.recipes.chats import ChatEncoder
from spikelm.recipes.data import Data, DataSettings, load_data
from spikelm.recipes.run import command, run
from spikelm.recipes.settings import Settings


def load_chats(settings: Settings, tokenizer: Any) -> Data:
    """The chats that `settings.data` names. Raises ValueError as `load_data` and `ChatEncoder` do."""
    data = DataSettings.of({"documents": "whole", **settings.data})
    if data.end_of_text is not None:
        raise ValueError("data.end_of_text: the chat template says how a chat ends; leave it out.")
    return load_data(data, tokenizer, settings.seed, ChatEncoder(tokenizer))


def train(config: Path) -> dict[str, Any]:
    """Fine-tune on chats as CONFIG, a YAML file, says."""
    return run(Settings.read(config), data=load_chats)


main = command(train)

if __name__ == "__main__":
    main()
