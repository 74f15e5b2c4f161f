"""spikelm: load, convert and evaluate spiking language models."""

from pathlib import Path

__version__ = "0.1.0"

# In a source checkout kernels/, recipes/ and eval/ sit beside this folder; a wheel maps them into it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
