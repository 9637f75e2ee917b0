"""Products with 4-bit kernels, dequantized tile by tile on the chip."""
