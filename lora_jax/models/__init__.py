"""The decoder, what its families differ in, and reading and writing whole models."""
