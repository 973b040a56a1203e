"""One file a stage: its `Recipe` on top, `run` below."""
