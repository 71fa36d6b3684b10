"""Hop 4. Groups compatible requests and decides when a batch leaves; knows no Redis, no Celery."""
