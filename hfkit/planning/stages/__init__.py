"""What each stage costs: a file for each, with `describe` and `work`."""
