"""Making a model smaller: fewer layers, heads and channels, fewer weights, fewer bits."""
