"""Write the embeddings of the committed references' prompts that transformers computes (needs torch and transformers).

    python -m tests.models.make_embeddings

`embeddings.safetensors` has, for every model of `EMBEDDED`, the mean of the hidden states after the final norm and the
last one of them, each divided by its length: float32 [hidden_size].
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.models.make_models import decoder_of, load
from tests.models.references import EMBEDDED, EMBEDDINGS, REFERENCES
from tests.models.safetensors_file import Array, write_safetensors


@torch.no_grad()
def embeddings(model: transformers.PreTrainedModel, token_ids: list[int]) -> dict[str, Array]:
    """Return the pooled hidden states of a text, by the name of the pooling."""
    states = decoder_of(model)(input_ids=torch.tensor([token_ids])).last_hidden_state[0].double()
    pooled = {"mean": states.mean(0), "last": states[-1]}
    return {name: (one / one.norm()).float().numpy() for name, one in pooled.items()}


def main(path: Path = EMBEDDINGS) -> None:
    tensors = {}
    for reference in REFERENCES:
        if reference.name in EMBEDDED:
            for name, vector in embeddings(load(reference.directory), reference.input_ids).items():
                tensors[f"{reference.name}.{name}"] = ("F32", vector)
    write_safetensors(path, tensors)


if __name__ == "__main__":
    main()
