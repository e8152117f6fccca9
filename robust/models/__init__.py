"""Architectures, one family a file; each registers itself in `robust.model.MODELS`."""
