"""Presets, and the watermarks that are made of them."""
