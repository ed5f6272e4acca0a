"""Data: registry -> records -> index -> fitted samples -> plan -> rows. No torch here; only vlft.errors and vlft.family."""
