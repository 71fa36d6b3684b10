"""Hop 5. What runs models: one module an engine, found by its name in `models.registry`."""
