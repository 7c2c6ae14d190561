"""Rewards made of preferences between the responses of a group."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from distrl.errors import ConfigError
from distrl.graders.grade import Grade
from distrl.judges import Judge, Preference, symmetrised

if TYPE_CHECKING:
    from distrl.tasks.problem import Problem


class WinRate:
    """The reward of a response is how often it beats others of its group: the mean preference over `opponents` of them.

    Response i meets those that follow it in the group, in a circle, and is met by those before it: every pair is judged
    once, in both orders unless the judge is symmetric, and counts for both. The sum over a group is half its size,
    whatever the judge says. A response without another, as in evaluations, meets the reference answer.

    Args:
        judge: who compares.
        opponents: that each response meets to its one side; the pairs are opponents times responses.
        parallel: comparisons at the same time.
    """

    def __init__(self, judge: Judge, opponents: int = 1, parallel: int = 4) -> None:
        if opponents < 1 or parallel < 1:
            raise ConfigError(f"options.opponents and options.parallel must be >= 1, got {opponents} and {parallel}")
        self._judge = judge
        self._opponents = opponents
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="judge")
        self.version = judge.version

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[Grade]:
        groups: dict[str, list[int]] = {}
        for row, problem in enumerate(problems):
            groups.setdefault(problem.prompt_id, []).append(row)
        pairs = [pair for rows in groups.values() if len(rows) > 1 for pair in _pairs(rows, self._opponents)]
        alone = [rows[0] for rows in groups.values() if len(rows) == 1]

        def compare(pair: tuple[int, int]) -> Preference:
            first, second = pair
            return symmetrised(self._judge, problems[first], str(responses[first]), str(responses[second]))

        def compare_with_answer(row: int) -> Preference:
            if not problems[row].answer:
                raise ValueError(
                    "a preference needs at least two responses to a prompt, or a reference answer to compare one with"
                )
            return symmetrised(self._judge, problems[row], str(responses[row]), problems[row].answer)

        found = list(self._threads.map(compare, pairs))
        wins: list[list[float]] = [[] for _ in problems]
        disagreements: list[list[float]] = [[] for _ in problems]
        for (first, second), preference in zip(pairs, found, strict=True):
            wins[first].append(preference.probability)
            wins[second].append(1.0 - preference.probability)
            for row in (first, second):
                disagreements[row].append(preference.disagreement)
        for row, preference in zip(alone, self._threads.map(compare_with_answer, alone), strict=True):
            wins[row].append(preference.probability)
            disagreements[row].append(preference.disagreement)
        return [_grade(w, d) for w, d in zip(wins, disagreements, strict=True)]


def _pairs(rows: Sequence[int], opponents: int) -> list[tuple[int, int]]:
    most = min(opponents, len(rows) // 2)
    pairs = {
        tuple(sorted((rows[i], rows[(i + distance) % len(rows)])))
        for distance in range(1, most + 1)
        for i in range(len(rows))
    }
    return sorted((a, b) for a, b in pairs)


def _grade(wins: Sequence[float], disagreements: Sequence[float]) -> Grade:
    reward = sum(wins) / len(wins)
    components = {"win_rate": reward, "disagreement": sum(disagreements) / len(disagreements)}
    return Grade(reward, components, "correct" if reward > 0.5 else "wrong")


class ModelJudge(WinRate):
    """Win rates by a `RewardModelJudge`, whose arguments it has."""

    def __init__(self, path: str, opponents: int = 1, device: str = "cpu", batch_size: int = 16) -> None:
        super().__init__(RewardModelJudge(path, device, batch_size), opponents, parallel=1)


class RewardModelJudge:
    """Judges by a reward model: the first is better with probability sigmoid(score difference), Bradley and Terry's.

    Args:
        path: see `distrl.graders.reward_model.RewardModel`, as for the other arguments.
    """

    symmetric = True
    """Each response is scored by itself: asking in the other order would score both again for the same answer."""

    def __init__(self, path: str, device: str = "cpu", batch_size: int = 16) -> None:
        from distrl.graders.reward_model import RewardModel

        self._model = RewardModel(path, batch_size=batch_size, device=device)
        self.version = self._model.version

    def prefer(self, problem: "Problem", first: str, second: str) -> float:
        import math

        one, other = (grade.reward for grade in self._model([problem, problem], [first, second]))
        return 1.0 / (1.0 + math.exp(min(700.0, other - one)))
