"""Problems as conversations."""

from distrl.tasks.config import DataConfig
from distrl.tasks.problem import Message, Problem, Task


def as_conversations(task: Task, config: DataConfig) -> Task:
    """The task with every prompt as a conversation, where `chat_template` asks for it.

    A plain prompt becomes the user's message; `system_prompt` comes before everything. Which problems are held out
    was decided before, so that another system prompt leaves the splits as they are.
    """
    if config.chat_template == "none":
        return task

    def converse(problem: Problem) -> Problem:
        messages = problem.messages or (Message("user", problem.prompt),)
        if config.system_prompt is not None:
            messages = (Message("system", config.system_prompt), *messages)
        return Problem.of(messages, problem.answer, problem.metadata)

    return task.map(converse)
