"""What a recipe will take before it runs: time, memory, disk, energy and money."""
