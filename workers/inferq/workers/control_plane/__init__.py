"""Celery's half of a worker: boot steps, remote control, task events, Celery's private parts.

bootsteps, service            start and stop everything, in order
remote_control, mailbox       answer ``celery inspect`` and ``celery control``
task_events, event_*          send Celery's task events, which Flower shows
celery_side, celery_inbox     take what the data plane hands to Celery
celery_private, kombu_guard   use or replace private parts of Celery and kombu
"""
