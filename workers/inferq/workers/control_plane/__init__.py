"""Celery's half of a worker: boot steps, remote control, task events, what is private of Celery.

bootsteps, service            start and stop everything, in order
remote_control, mailbox       what ``celery inspect`` and ``celery control`` ask
task_events, event_*          what Flower is told of each request
celery_side, celery_inbox     what the data plane hands to Celery
celery_private, kombu_guard   what is private of Celery and kombu
"""
