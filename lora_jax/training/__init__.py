"""What a training step is made of: losses, optimizer, batches, the step. Nothing here knows of files or signals."""
