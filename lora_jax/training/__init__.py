"""The training step and its parts: losses, optimizer, batches. Nothing here knows about files or signals."""
