"""Causal self-attention over segments and windows, or over a cache: implementations, and sharding over a mesh."""
