"""Event-driven inference: weights laid out by input row, so that silent inputs are work not done."""

from spikelm.inference.prepare import prepare_for_inference, restore_dense

__all__ = ["prepare_for_inference", "restore_dense"]
