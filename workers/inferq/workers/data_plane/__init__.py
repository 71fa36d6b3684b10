"""The request path: one thread claims, forms batches, hands them to lanes and settles.

plane          the loop; `scheduling` says what it takes on next, `budget` how much
incarnation    how links join it, how it is lost, how it is handed back; `held` is what it holds
calls          what other threads have run between two batches
receiver       hop 3, with `intake`: from claimed bytes to requests, which `admission` has wait
served_model   one model: its engine, lanes, waiting requests and knobs
lanes          hop 5: a thread for each lane
settling       hop 6, with `results`: what has ended and is not settled yet
observers      who is told of all this: `counts`, `batch_log`, and the control plane's task events
control        what the data plane asks of the control plane
"""
