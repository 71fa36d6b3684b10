"""What the project says of itself, shown: each module has functions that return one figure."""
