"""What a command does, as one call: embed, select, train, and the care of stores."""
