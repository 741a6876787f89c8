"""Predicts the species of an iris flower."""

__version__ = "0.1.0"
