"""Models that can be run and watched: transformers, streamed checkpoints, Megatron-Core."""
