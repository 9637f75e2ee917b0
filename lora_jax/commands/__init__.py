"""The commands besides train, one per file: options and stages."""
