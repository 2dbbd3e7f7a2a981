"""Euler steps, guidance, the jump between stages, and noise."""
