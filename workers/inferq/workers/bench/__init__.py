"""``inferq bench``: a load generator that measures a served model, and where the time goes.

command   the options, and what is printed
loads     what to send and when: concurrency, rate, trace
arrays    requests' inputs, from the model's signature or from files
crew      the producer processes, seen from the command (`messages` is what they say)
child     one producer process; `sender` runs a step in it, `recorder` counts
steps     a step from warm-up to stable; `tally` is what is counted, `figures` what follows
tables, plot, compare   how it is shown
"""
