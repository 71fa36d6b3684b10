"""The protocol with Redis: how a worker claims requests, holds them by a lease, and settles them.

ledger        claims and settles; `claim` and `verdicts` are what it reads, `runs` and `settlement`
              what it writes
fenced        sends that in one fenced MULTI per round trip, on a `link`
records       reads what Redis holds of a worker's claims and requests
lease         keeps the worker's lease; `recovery` takes over from a worker that lost its own
scheduled     keeps requests whose ETA is ahead
rollback      stores results again where Redis went back in time
payloads      reads large tensors, which travel beside their messages
oom           writes to a full Redis
wrong_type    reports keys that hold another Redis type than expected
"""
