"""What follows on a request (links, chains, groups, chords): checked, and published as Celery does.

following, options, place, link_queues   what a message may ask for; all else is refused or dropped
publisher, sender, patience, pace        a thread that publishes it: how long it tries, how fast
chord_results, chord_claims              what a chord's parts came to; who publishes its body
in_hand                                  whose links are under way
celery_canvas                            all that is private of Celery here
"""
