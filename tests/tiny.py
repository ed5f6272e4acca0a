"""The tiny checkpoints that tests train, re-exported under a short name."""

from vlft.testing.tiny import *  # noqa: F403
