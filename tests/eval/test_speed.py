import time
from contextlib import contextmanager, nullcontext

import torch

from spikelm.eval.speed import DECODE_TOKENS, PREFILL_PASSES, tokens_per_second


def test_both_models_are_timed_in_turn_on_rotating_windows(make_pair):
    model, baseline = make_pair(num_hidden_layers=1)
    order, entered = [], []
    for name, network in (("model", model), ("baseline", baseline)):
        network.register_forward_hook(
            lambda m, args, kwargs, out, name=name: order.append((name, kwargs["input_ids"].shape[1])), with_kwargs=True
        )
    model.register_forward_hook(lambda *_: time.sleep(0.02))

    @contextmanager
    def apply():
        entered.append(1)
        yield

    windows = [torch.arange(40), torch.arange(30)]
    speed = tokens_per_second({"model": (model, apply), "baseline": (baseline, nullcontext)}, windows)
    prefill, decode = order[: 2 * (1 + PREFILL_PASSES)], order[2 * (1 + PREFILL_PASSES) :]
    assert [name for name, _ in order] == ["model", "baseline"] * (len(order) // 2)
    assert [length for _, length in prefill[::2]] == [40, 30, 40, 30, 40, 30]
    assert [length for _, length in decode[::2]] == [32] + [1] * (DECODE_TOKENS + 1)
    assert len(entered) == len(order) // 2
    # The delay bounds the model's speed from above; its baseline has none.
    assert 0 < speed["model"]["decode"] < 50 and speed["model"]["prefill"] < 40 / 0.02
    assert speed["baseline"]["decode"] > speed["model"]["decode"]
