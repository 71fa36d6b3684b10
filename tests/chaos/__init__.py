"""A ledger of every request under faults, in the spirit of Jepsen: ``make chaos``.

schedule    what fails when, drawn from a seed
clock       the schedule's time
content     what is asked and what the answer must be, drawn from the same seed
proxy       stands between everybody and Redis: cuts, delays, swallows
burst       thousands of quick requests beside claims that are settled in part
store       the real Redis, killed and started again, with the end of its AOF cut off or not
crew        three real worker processes, killed, stopped and started again
faults      does the schedule's faults to Redis and to the network
producer    a process with the real client; it writes down what was accepted and what came of it
ledger      reads what the producers wrote
record      what was done, and whom it hit
judge       what was lost, changed or wrong, and how long recoveries took
report      how all that is shown
run         all of it together
"""
