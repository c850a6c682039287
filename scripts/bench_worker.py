"""One side of bench_against.py: an engine of any revision, with a model loaded.

It imports the modules of that revision, so it uses only names of the first version (random weights need
`Engine.random`). It prints a line of JSON when it is ready, and one per turn; a line of its input starts a turn.
"""

import json
import sys

from numba_atomflow import AtomFlowError, Engine, ModelGeometry, SamplingParams


def main() -> int:
    """Serve turns until standard input ends."""
    task = json.loads(sys.argv[1])
    count = task["decode_tokens"]
    positions = task["prompt_tokens"] + count + 1
    plain = {"speculate": "off"} if hasattr(SamplingParams, "speculate") else {}  # earlier versions have no choice
    params = SamplingParams(max_tokens=count + 1, ignore_eos=True, **plain)
    where = (task["backend"], positions, task["threads"])
    decode = (
        {} if task.get("decode", "auto") == "auto" else {"decode": task["decode"]}
    )  # earlier versions have no choice
    try:
        if "path" in task:
            engine = Engine.load(task["path"], *where, **decode)
            generate = engine.generate
        else:
            engine = Engine.random(ModelGeometry.from_dict(task["geometry"]), *where, **decode)
            generate = engine.generate_tokens
    except (AtomFlowError, AttributeError, TypeError) as error:
        print(error, file=sys.stderr)
        return 2
    with engine:
        prompt = [i % engine.geometry.vocabulary for i in range(task["prompt_tokens"])]
        path = getattr(engine.backend, "decode_path", None)
        print(json.dumps({"device": engine.backend.device, "decode": path and path.name}), flush=True)
        for _ in sys.stdin:
            engine.reset()
            stats = generate(prompt, params).finish().stats
            print(json.dumps({"ttft": stats.ttft, "tpot": stats.tpot}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
