"""Data sets, one a file; each registers itself in `robust.dataset.DATASETS`."""
