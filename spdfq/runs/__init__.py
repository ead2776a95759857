"""A run: its stages in order, the store of finished stages, and what they depend on."""
