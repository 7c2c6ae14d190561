"""The learner: training loop, batching, optimiser, checkpoints, publishing of weights."""
