"""Benches: grids of runs, and a table of their results."""
