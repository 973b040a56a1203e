"""Raw text to packed token rows."""
