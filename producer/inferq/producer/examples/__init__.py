"""Preprocessing for the demo's two models: short, and meant to be copied."""
