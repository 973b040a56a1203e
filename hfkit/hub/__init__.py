"""Cards, and later the push, of what the stages make."""
