"""Putting marks into models, and models into files."""
