"""On a worker's PYTHONPATH: it speaks the protocol version after this one."""

from inferq.shared import names

names.PROTOCOL += 1  # type: ignore[misc]
