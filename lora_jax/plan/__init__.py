"""What a run needs on a device, from the compiler, before any accelerator is rented."""
