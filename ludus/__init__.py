"""Ludus trains language models by letting them play against versions of themselves."""

__version__ = "0.1.0"
