"""Checks while serving: some requests of a batch run again alone, and the answers are compared."""
