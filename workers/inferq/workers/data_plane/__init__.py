"""The request path: one thread claims, forms batches, hands them to lanes and settles.

plane          the loop; `scheduling` decides what it takes on next, `budget` how much
incarnation    joins new links, ends a lost incarnation, hands back; `held` is what it holds
calls          runs functions of other threads between two batches
receiver       hop 3, with `intake`: turns claimed bytes into requests; `admission` makes them wait
served_model   one model: its engine, lanes, waiting requests and knobs
lanes          hop 5: a thread for each lane
settling       hop 6, with `results`: holds what has ended and is not settled yet
observers      are told of all this: `counts`, `batch_log`, and the control plane's task events
control        what the data plane asks of the control plane
"""
