"""LayerNorm with separable modulation, and the gated residual."""
