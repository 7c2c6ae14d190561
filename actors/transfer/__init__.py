"""The fast way of new weights: from a process beside the learner to one beside each generation actor.

Version, manifest and hashes come from the policy store; here go the bytes. Whatever may hang, a collective with a peer
that is gone above all, runs in a process of its own that can be killed:

    learner --file in memory--> sender, one per receiver ===nccl, ipc===> receiver --file in memory--> actor

Neither the learner nor an actor is part of any group, and a sender serves one receiver alone: a process that dies or
stops costs its own actor one deadline, and then the bytes come from the store.
"""
