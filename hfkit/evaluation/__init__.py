"""Models scored on data, and beside each other."""
