"""What a run cost: seconds and joules."""
