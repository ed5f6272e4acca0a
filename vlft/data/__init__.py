"""Data: registry -> records -> index -> fitted samples -> plan -> rows. Imports only vlft.errors and vlft.family; no torch here."""
