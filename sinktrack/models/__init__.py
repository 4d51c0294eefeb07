"""Models that can be run and watched: of transformers, Megatron-Core, streamed, or of any code."""
