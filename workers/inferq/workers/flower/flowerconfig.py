"""Flower's configuration file: ``celery -A inferq.workers.app flower --conf=<this file>``.

Flower takes every name here that is an option of its own for that option's value, so only this
one is imported.
"""

from inferq.workers.flower.configure import configure

configure()
