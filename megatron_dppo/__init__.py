"""RL post-training of mixture-of-experts language models with DPPO on Megatron-core."""

__version__ = "0.1.0"
