"""Budgets of latency, accuracy, size and exit rates that a compiled program has to keep, and their check."""
