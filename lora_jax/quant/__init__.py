"""Base weights in 4 or 8 bits: how they are stored, made, read back and multiplied with."""
