"""Shipped recipes and the parts they are made of, as package data."""
