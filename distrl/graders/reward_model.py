"""Scores of a reward model: a Hugging Face sequence classifier."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrl.errors import ConfigError, DataError
from distrl.graders.grade import Grade

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem

_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")


class RewardModel:
    """The model's score of prompt and response: its only logit, or with several labels the probability of one.

    A conversation goes through the tokenizer's chat template, a plain prompt and its response are put together as they
    are. Sequences are padded to the longest of a batch and never cut: one that is too long fails.

    Args:
        path: Hugging Face directory of an `AutoModelForSequenceClassification` with its tokenizer.
        batch_size: sequences of one forward pass.
        device: of torch, such as `cpu` or `cuda:0`.
        dtype: of the weights, `float32` or `bfloat16`.
        label: which label's probability is the reward, of several.
        threshold: a response counts as correct from this reward on.
        threads: CPU threads of torch, for the whole process.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 16,
        device: str = "cpu",
        dtype: str = "float32",
        label: int = 1,
        threshold: float = 0.5,
        threads: int = 1,
    ) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        directory = Path(path)
        if not (directory / "config.json").is_file():
            raise DataError(
                f"options.path of the grader reward_model must be a Hugging Face directory, got {path!r} without a "
                "config.json; check the path"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"options.dtype of the grader reward_model must be float32 or bfloat16, got {dtype!r}")
        torch.set_num_threads(threads)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=getattr(torch, dtype), local_files_only=True
        )
        if model.config.num_labels > 1 and not 0 <= label < model.config.num_labels:
            raise ConfigError(
                f"options.label of the grader reward_model must be from 0 to {model.config.num_labels - 1}, got {label}"
            )
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self._pad_token_id
        self._model = model.to(device).eval()
        self._batch_size = batch_size
        self._label = label
        self._threshold = threshold
        self._longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30))
        self.version = content_version(directory)

    @property
    def _pad_token_id(self) -> int:
        tokenizer = self._tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        rows = [self._encode(p, str(r)) for p, r in zip(problems, responses, strict=True)]
        # Sequences of similar length share a batch.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        rewards = [0.0] * len(rows)
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for row, reward in zip(chosen, self._score([rows[row] for row in chosen]), strict=True):
                rewards[row] = reward
        return [
            Grade(reward, {"reward_model": reward}, "correct" if reward >= self._threshold else "wrong")
            for reward in rewards
        ]

    def _encode(self, problem: "Problem", response: str) -> list[int]:
        tokenizer = self._tokenizer
        if problem.messages:
            turns = [*(m._asdict() for m in problem.messages), {"role": "assistant", "content": response}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
        else:
            ids = tokenizer.encode(problem.prompt + response)
        if len(ids) > self._longest:
            raise ValueError(
                f"prompt {problem.prompt_id} and response have {len(ids)} tokens, the reward model takes "
                f"{self._longest}"
            )
        return list(ids)

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        import torch

        width = max(map(len, rows))
        pad = self._pad_token_id
        device = self._model.device
        ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            logits_BL = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits.float()
        scores_B = logits_BL[:, 0] if logits_BL.shape[1] == 1 else logits_BL.softmax(-1)[:, self._label]
        return [float(score) for score in scores_B]


def content_version(directory: Path) -> str:
    """Twelve digits that name the content of the model's files."""
    digest = hashlib.sha256()
    for pattern in _WEIGHTS:
        for file in sorted(directory.glob(pattern)):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]
