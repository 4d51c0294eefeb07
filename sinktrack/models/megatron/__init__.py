"""Megatron-Core models, which several processes hold together."""
