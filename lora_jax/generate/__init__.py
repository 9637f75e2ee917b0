"""Generation: a model and its adapter in memory, a KV cache, and sampling."""
