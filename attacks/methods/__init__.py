"""One attack a file; a file that is put here registers itself."""
