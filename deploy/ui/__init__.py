"""`distrl ui` and `distrl rollouts`: a run to look at, rollout by rollout, while it goes on.

index     all rollouts of a run in an SQLite file beside it, to search and filter
tokens    one rollout, token by token
pages     what the pages say
server    serves them on the loopback address
"""
