"""Block-causal attention over stages."""
