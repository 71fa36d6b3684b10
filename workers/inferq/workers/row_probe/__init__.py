"""Runs a model on examples to find out whether its rows are independent of each other."""
