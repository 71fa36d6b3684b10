"""`make gpu`: what the CUDA lanes do on a real card. Builds, checks and times; prints one table.

    models     what is run: two real models, and a ResNet-50 that takes pictures as users send them
    checks     are the answers right, row by row? with inputs whose answers are far apart
    together   several lanes at once; what one of them raises ends all of them
    lanes      correctness, throughput against the same engine back to back, growth
    path       the whole way through Redis, with several producers
    sticky     a sticky error on purpose: how it is noticed, how long until it serves again
    run        the order of all that, the table, build/gpu.json

With `helpers.fakecuda` and `helpers.double_trt` it runs without a card, to see that it works at
all; its figures mean nothing then, and it says so.
"""
