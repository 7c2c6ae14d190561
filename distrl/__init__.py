"""The core of distrl: schema, config, tickets, objectives, tasks and models. Never imports ray or vllm."""

__version__ = "0.1.0"
