"""``inferq demo``: two real models, real input, one worker process, and figures at the end."""
