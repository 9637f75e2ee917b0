"""The commands beside train, one a file: options and stages."""
