"""The version of the engine: setup, files and verdicts read it here."""

__version__ = "0.1.0"
