"""``inferq doctor``: checks what prevents serving, and says what to do about it.

finding.py   what a check finds, and how long one may take
redis.py     the Redis that holds queues, claims and results
host.py      GPUs and installed packages of this host
models.py    the model repository
workers.py   Celery workers that take requests they cannot serve
"""
