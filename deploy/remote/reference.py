"""The reference actor."""

from actors.reference import Reference
from deploy.remote.located import Located
from distrl.config import Config


class ReferenceActor(Reference, Located):
    """`Reference` with the reference model, or with the model that training starts from."""

    def __init__(self, config: Config) -> None:
        from actors.scoring import model_scorer  # torch, which holders of a handle import as well

        path = config.reference.path or config.model.path
        super().__init__(model_scorer(path, config.rollout.temperature, config.run.threads_per_process))
