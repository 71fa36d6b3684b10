"""What ``inferq worker`` and ``inferq flower`` run: Celery's command, away from where it stands.

``celery`` itself looks in the working directory first for whatever it imports by name, as suits a
project that is developed there. Ours is the same program without that: a file called redis.py that
happens to lie there, or was put there, is not run. Whoever runs ``celery`` gets what Celery does.
"""

from __future__ import annotations

from celery.__main__ import main

from inferq.workers.control_plane import celery_private
from inferq.workers.process import shelves

if __name__ == "__main__":
    shelves.guard("--statedb or --schedule")
    celery_private.keep_out_working_directory()
    main()
