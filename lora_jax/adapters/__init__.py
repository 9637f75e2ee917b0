"""Adapters as transforms of trees: who is adapted, init, PEFT files, merging."""
