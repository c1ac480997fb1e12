"""Quality of a model on held-out text and on tasks, and what a change costs, with its error."""

from short_gpt.evaluation.harness import hugging_face_lm, llama_lm
from short_gpt.evaluation.paired import Difference, combined, difference, losses
from short_gpt.evaluation.perplexity import Perplexity, perplexity
from short_gpt.evaluation.protocols import PROTOCOLS, protocol
from short_gpt.evaluation.tasks import (
    TaskDifference,
    TaskRun,
    TaskSuite,
    run_tasks,
    task_changes,
    task_difference,
    task_names,
)

__all__ = ["PROTOCOLS", "Difference", "Perplexity", "TaskDifference", "TaskRun", "TaskSuite"]
__all__ += ["difference", "hugging_face_lm", "llama_lm", "losses", "perplexity", "protocol"]
__all__ += ["combined", "run_tasks", "task_changes", "task_difference", "task_names"]
