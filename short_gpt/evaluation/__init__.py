"""Quality of a model on held-out text and on tasks, and what a change costs, with its error."""

from typing import TYPE_CHECKING

from llama import lazy

if TYPE_CHECKING:
    from short_gpt.evaluation.harness import hugging_face_lm, llama_lm
    from short_gpt.evaluation.perplexity import (
        PROTOCOLS,
        Difference,
        Perplexity,
        combined,
        difference,
        protocol,
        window_perplexities,
    )
    from short_gpt.evaluation.tasks import (
        TaskDifference,
        TaskRun,
        TaskSuite,
        run_tasks,
        task_changes,
        task_difference,
        task_names,
    )
else:
    __getattr__, __dir__ = lazy(__name__)

__all__ = ["PROTOCOLS", "Difference", "Perplexity", "TaskDifference", "TaskRun", "TaskSuite"]
__all__ += ["combined", "difference", "hugging_face_lm", "llama_lm", "protocol", "run_tasks"]
__all__ += ["task_changes", "task_difference", "task_names", "window_perplexities"]
