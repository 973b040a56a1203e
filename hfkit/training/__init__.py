"""What every kind of training shares."""
