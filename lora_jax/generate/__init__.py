"""Completing prompts: a model and its adapter in memory, a cache of keys and values, the choice of tokens."""
