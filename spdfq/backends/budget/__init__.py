"""Bit-widths of single sites, chosen to meet a budget."""
