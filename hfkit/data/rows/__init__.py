"""Rows of tokens: what a model is given."""
