"""Layouts of other projects' checkpoints, one project a file; each registers itself in `robust.layout.LAYOUTS`."""
