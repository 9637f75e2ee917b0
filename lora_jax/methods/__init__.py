"""PEFT's methods: who is adapted, with what, and what follows from it; a file each."""
