"""What transformers' Trainer lacks for models whose parameters are split over processes (FSDP2, DeepSpeed ZeRO-3).

With mixed precision, Accelerate's FSDP2 rounds every parameter to bfloat16 for the forward pass, decays and thresholds
too, sums gradients in bfloat16, and rounds the loss. Here parameters are gathered, and gradients summed, in float32,
and autocast rounds what matrix products read: the arithmetic of one device, for twice the traffic.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from accelerate.utils import AutocastKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer

_MARKS = {"pytorch_model_fsdp_0": "FSDP2", "latest": "DeepSpeed"}  # what only their checkpoints hold


class ShardedTrainer(Trainer):
    """A Trainer that computes the same whether parameters are split or not, and writes whole models either way."""

    def create_accelerator_and_postprocess(self) -> None:
        """Raises ValueError if the launch config asks for a split that Accelerate leaves out without a word."""
        super().create_accelerator_and_postprocess()
        if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and not self.is_fsdp_enabled:
            raise ValueError(
                "the launch config asks for FSDP, which Accelerate starts only in several processes on GPUs; this "
                "would train whole copies. Use cpu, cpu_two, gpu or ddp."
            )
        if self.accelerator.is_fsdp2:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager:
        """Autocast for FSDP2; what Accelerate wraps otherwise has its own."""
        if not self.accelerator.is_fsdp2:
            return nullcontext()
        # A cache would hold a copy of every layer's whole weights until the pass ends.
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    @property
    def is_split(self) -> bool:
        """Whether parameters are split over processes, so that optimiser checkpoints hold them beside their states."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model; called by all processes, written by the main one."""
        if not self.accelerator.is_fsdp2:  # of which Trainer writes nothing where checkpoints are sharded
            super().save_model(output_dir, _internal_call)
            return
        state = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            tied = getattr(self.model, "all_tied_weights_keys", {})  # gathered twice, they no longer share memory
            self._save(output_dir, state_dict={name: t for name, t in state.items() if name not in tied})

    def check_layout(self, checkpoint: Path) -> None:
        """Raise ValueError if a checkpoint was written by another engine than the one that is to read it."""
        theirs = next((name for mark, name in _MARKS.items() if (checkpoint / mark).exists()), "one whole model")
        ours = "FSDP2" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else "one whole model"
        if theirs != ours:
            raise ValueError(
                f"{checkpoint} was written by a run with {theirs}, this one has {ours}: start it with the launch "
                "config that it had."
            )
