"""The protocol with Redis: how a worker claims requests, holds them by a lease, and settles them.

ledger        the protocol itself, on a `link`; `claim` and `verdicts` are what it reads,
              `runs` and `settlement` what it writes
lease         that the worker lives; `recovery` is what others do once it does not
scheduled     requests with an ETA
rollback      what is stored again where Redis went back in time
payloads      large tensors, which travel beside their messages
oom, wrong_type  a full Redis, and keys that hold something else
"""
