"""Checks while serving: runs some requests of a batch again alone and compares the answers."""
