"""Causal self-attention over segments and windows, and over a cache: who computes it, and how it is cut over a mesh."""
