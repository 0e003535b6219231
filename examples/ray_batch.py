"""Answer a data set with Ray Data: on this machine, or on every node of a Ray cluster.

pip install 'ray[data]>=2.55,<3'
python examples/ray_batch.py questions.jsonl answers
"""

from __future__ import annotations

import sys

import ray

from argosy.batch import Answers


def main(questions: str, answers: str) -> None:
    rows = ray.data.read_json(questions, lines=True)  # rows with the column `prompt`
    answered = rows.map_batches(
        Answers,
        fn_constructor_args=["demo"],
        fn_constructor_kwargs={"memory": "2GiB", "max_tokens": 64},
        batch_size=32,  # answered together: they share every expert that is read
        compute=ray.data.ActorPoolStrategy(size=1),  # engines
        num_cpus=1,  # Ray sets these aside for each; reading and writing need some, too
    )
    answered.write_json(answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
