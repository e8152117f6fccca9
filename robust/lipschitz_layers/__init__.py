"""Layers that are 1-Lipschitz in l2 by construction, one method a file; each registers itself in `LIPSCHITZ_LAYERS`."""
