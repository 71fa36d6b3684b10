"""A ledger of every request under faults, in the spirit of Jepsen: ``make chaos``.

schedule    what fails when, drawn from a seed
proxy       stands between everybody and Redis: cuts, delays, swallows
store       the real Redis, killed and started again, with the end of its AOF cut off or not
crew        three real worker processes, killed, stopped and started again
content     what is asked and what the answer must be, drawn from the same seed
producer    a process with the real client; it writes down what was accepted and what came of it
ledger      reads what the producers wrote
judge       what was lost, changed or wrong
run         all of it together
"""
