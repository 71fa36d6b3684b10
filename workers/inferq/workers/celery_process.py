"""What ``inferq worker`` and ``inferq flower`` run: Celery, without the working directory.

``celery`` itself looks in the working directory first for what it imports by name, as suits a
project that is developed there. This is the same program without that: a file called redis.py that
lies there is not run. Who runs ``celery`` directly gets Celery's behaviour.
"""

from __future__ import annotations

from celery.__main__ import main

from inferq.workers.control_plane import celery_private
from inferq.workers.process import shelves

if __name__ == "__main__":
    shelves.guard("--statedb or --schedule")
    celery_private.keep_out_working_directory()
    main()
