"""Branching rules of branch and bound, one a file."""
