"""Data: registry -> records -> index -> fitted samples -> plan -> rows. Needs only vlft.errors and vlft.family."""
