"""The decoder and its families, and reading and writing whole models."""
