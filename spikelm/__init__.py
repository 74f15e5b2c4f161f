"""spikelm: load, convert and evaluate spiking language models."""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout kernels/, recipes/ and eval/ sit beside this folder; a wheel maps them into it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from spikelm import presets  # noqa: E402
from spikelm.adapters import load_adapter  # noqa: E402
from spikelm.cache import SpikeCache  # noqa: E402
from spikelm.configuration import SpikeLMConfig  # noqa: E402
from spikelm.conversion.convert import convert  # noqa: E402
from spikelm.conversion.importing import export_checkpoint, import_checkpoint  # noqa: E402
from spikelm.inference import prepare_for_inference, restore_dense  # noqa: E402
from spikelm.modeling import (  # noqa: E402
    SpikeLMForCausalLM,
    SpikeLMForSequenceClassification,
    SpikeLMForTokenClassification,
    SpikeLMModel,
)
from spikelm.spiking import SpikeStatistics, execute_trains, spike_groups  # noqa: E402

AutoConfig.register(SpikeLMConfig.model_type, SpikeLMConfig, exist_ok=True)
AutoModel.register(SpikeLMConfig, SpikeLMModel, exist_ok=True)
AutoModelForCausalLM.register(SpikeLMConfig, SpikeLMForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SpikeLMConfig, SpikeLMForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(SpikeLMConfig, SpikeLMForTokenClassification, exist_ok=True)

__all__ = [
    "SpikeCache",
    "SpikeLMConfig",
    "SpikeLMForCausalLM",
    "SpikeLMForSequenceClassification",
    "SpikeLMForTokenClassification",
    "SpikeLMModel",
    "SpikeStatistics",
    "convert",
    "execute_trains",
    "export_checkpoint",
    "import_checkpoint",
    "load_adapter",
    "prepare_for_inference",
    "presets",
    "restore_dense",
    "spike_groups",
]
