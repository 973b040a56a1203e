"""What runs, in which order, and what is there already."""
