"""Keeps workers alive and says how they are: one supervisor, a child per device, heartbeats."""
