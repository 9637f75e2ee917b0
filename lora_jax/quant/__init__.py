"""Base weights in 4 or 8 bits: storage, quantization, dequantization and products."""
