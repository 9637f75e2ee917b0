"""What a run needs on a device, according to the compiler, before an accelerator is rented."""
