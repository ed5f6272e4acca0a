"""vlft fine-tunes vision-language models on conversations about images.

These names are the whole surface that a plugin may import; a test pins them.
"""

from vlft.errors import VlftError
from vlft.family import Part, Parts
from vlft.strategy import Exporter, ModelSource, ParamGroup, Strategy, StrategyConfig

__all__ = ["Exporter", "ModelSource", "ParamGroup", "Part", "Parts", "Strategy", "StrategyConfig", "VlftError"]
__version__ = "0.1.0"
