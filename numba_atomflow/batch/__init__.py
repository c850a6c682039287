"""Many prompts over the CPU cores and GPUs of one machine or of a Ray cluster.

    from numba_atomflow.batch import generate_batch

    rows = [{"id": "a", "prompt": "The capital of France is"}, {"id": "b", "prompt": "1, 2, 3,"}]
    report = generate_batch(rows, "results", "smollm2-135m-instruct")
    for result in report.results():
        print(result["id"], result["error"] or result["text"])

Needs the extra `ray`. docs/batch.md says what a row may hold, and what happens when a process or a machine fails.
"""

from numba_atomflow.batch.cluster import ActorOptions
from numba_atomflow.batch.run import BatchReport, generate_batch, perplexity_batch, validate_batch
from numba_atomflow.batch.tasks import EngineOptions, GenerateTask, PerplexityTask, Task, ValidateTask

__all__ = [
    "ActorOptions",
    "BatchReport",
    "EngineOptions",
    "GenerateTask",
    "PerplexityTask",
    "Task",
    "ValidateTask",
    "generate_batch",
    "perplexity_batch",
    "validate_batch",
]
