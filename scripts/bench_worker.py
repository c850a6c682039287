"""One side of bench_against.py: any revision of the engine, with a model loaded.

It is run with the other revision's modules, so it uses what has been there since the first version (random weights need
`Engine.random`). It prints a line of JSON when it is ready, and one for each line that it reads: a turn.
"""

import json
import sys

from numba_atomflow import AtomFlowError, Engine, ModelGeometry, SamplingParams


def main() -> int:
    """Serve turns until standard input ends."""
    task = json.loads(sys.argv[1])
    count = task["decode_tokens"]
    positions = task["prompt_tokens"] + count + 1
    params = SamplingParams(max_tokens=count + 1, ignore_eos=True)
    where = (task["backend"], positions, task["threads"])
    try:
        if "path" in task:
            engine = Engine.load(task["path"], *where)
            generate = engine.generate
        else:
            engine = Engine.random(ModelGeometry.from_dict(task["geometry"]), *where)
            generate = engine.generate_tokens
    except (AtomFlowError, AttributeError) as error:
        print(error, file=sys.stderr)
        return 2
    with engine:
        prompt = [i % engine.geometry.vocabulary for i in range(task["prompt_tokens"])]
        print(json.dumps({}), flush=True)
        for _ in sys.stdin:
            engine.reset()
            stats = generate(prompt, params).finish().stats
            print(json.dumps({"ttft": stats.ttft, "tpot": stats.tpot}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
