"""Products with 4-bit kernels, decoded tile by tile on the chip."""
