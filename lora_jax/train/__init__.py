"""What a training step is made of: losses, optimiser, batches, the step. Nothing here knows of files or signals."""
