"""The Ray actors of a run: each builds its worker from the config in its own process.

A module each, because an actor's process imports the module of its class: the graders, the journal, the store and the
coordinator must not pay for torch.
"""
