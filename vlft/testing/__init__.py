"""For plugin authors: `check_strategy` holds a strategy to its contract on tiny models (`make_checkpoint`)."""

from vlft.testing.conformance import check_strategy
from vlft.testing.tiny import FAMILIES, make_checkpoint

__all__ = ["FAMILIES", "check_strategy", "make_checkpoint"]
