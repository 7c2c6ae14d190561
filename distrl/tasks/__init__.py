"""Tasks: where prompts come from, which problems are held out, and in which order they are drawn.

    task = load_task(DataConfig(source="sort_digits"))
    problem = task.train[prompt_index(seed=0, draw=17, size=len(task.train))]

Needs no torch: importing it costs the coordinator and the graders nothing.
"""

from distrl.tasks.config import DataConfig
from distrl.tasks.order import prompt_index
from distrl.tasks.problem import Dataset, Message, Problem, Task
from distrl.tasks.registry import load_task

__all__ = ["DataConfig", "Dataset", "Message", "Problem", "Task", "load_task", "prompt_index"]
