"""Tokens out of a model."""
