"""Shards: the rows that one process runs one after the other, and whose results are one file."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from numba_atomflow.batch.rows import Row
from numba_atomflow.batch.tasks import Task
from numba_atomflow.errors import AtomFlowError


class Plan(NamedTuple):
    """Which rows run, and in which order.

    Attributes:
        shards: rows of each shard. The plan follows from the rows alone, so that a later run finds the same shards.
        refused: rows that do not run, each with its error.
    """

    shards: list[list[Row]]
    refused: list[Row]


def plan_shards(rows: Sequence[Row], task: Task, rows_per_shard: int) -> Plan:
    """Rows in the order of their prompts, so that those with a common prefix follow each other, cut into shards.

    That is the order in which an engine with one KV cache computes the fewest tokens: a depth-first walk of the tree
    of prefixes.
    """
    refused: list[Row] = []
    keyed: list[tuple[str, int, Row]] = []
    for row in rows:
        try:
            if row.error is None:
                keyed.append((task.prepare(row.fields), row.line, row))
                continue
        except AtomFlowError as error:
            row = replace(row, error=str(error))
        refused.append(row)
    ordered = [row for _, _, row in sorted(keyed, key=lambda entry: entry[:2])]
    return Plan([ordered[i : i + rows_per_shard] for i in range(0, len(ordered), rows_per_shard)], refused)
