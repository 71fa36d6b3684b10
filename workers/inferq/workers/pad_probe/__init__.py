"""Measures, once a model is loaded, whether it may be padded and what to cut off its outputs."""
