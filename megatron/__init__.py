"""Distributed pretraining of T5 encoder-decoder models."""

__version__ = "0.1.0"
