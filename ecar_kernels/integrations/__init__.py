"""Other libraries' blocks, computed from the ops: `ecar_kernels.accelerate` finds them by name.

| library | blocks | models |
|---|---|---|
| diffusers | BasicTransformerBlock with ada_norm_zero or ada_norm_single | DiT, PixArt, Latte |
| diffusers | JointTransformerBlock | Stable Diffusion 3 and 3.5 |
| diffusers | FluxTransformerBlock, FluxSingleTransformerBlock | Flux |
| diffusers | QwenImageTransformerBlock | Qwen-Image |
| DiT's and SiT's own code | DiTBlock, SiTBlock, over timm's Attention and Mlp | DiT, SiT |
| VAR's own code | AdaLNSelfAttn | VAR |
| MAR's own code | SimpleMLPAdaLN | MAR and others with its diffusion loss |

Each file says when a block is one that it knows (`why_not`) and how it is computed (`run`); a block
that is not is left alone, and reported with the reason. Nothing of a library is imported.
"""

from ecar_kernels.integrations import basic, dit, flux, joint, mar, qwen, var

__all__ = ["basic", "dit", "flux", "joint", "mar", "qwen", "var"]
