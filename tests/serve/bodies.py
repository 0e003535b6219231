"""For each route with a JSON body a valid one, around a text. A new dialect has its routes' bodies here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BODIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "/tokenize": lambda text: {"content": text},
    "/detokenize": lambda text: {"tokens": [1]},
    "/apply-template": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 1},
    "/v1/embeddings": lambda text: {"input": text},
    "/v1/rerank": lambda text: {"query": "what", "documents": ["fine", text]},
    "/rerank": lambda text: {"query": text, "documents": ["fine"]},
    "/v1/moderations": lambda text: {"input": text},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 1},
    "/v1/responses/input_tokens": lambda text: {"input": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    "/v1/messages/count_tokens": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/engine/stops": lambda text: {"kind": "user", "name": text, "is_stopped": False},
    "/v1/engine/memory": lambda text: {"memory": "100TiB"},
    "/v1/cluster/add": lambda text: {"host": "127.0.0.1:1"},
    "/v1/cluster/drain": lambda text: {"host": "127.0.0.1:1"},
    "/v1/load_lora_adapter": lambda text: {"lora_name": "support", "lora_path": text or "."},
    "/v1/unload_lora_adapter": lambda text: {"lora_name": "support"},
    "/infill": lambda text: {"input_prefix": text, "input_suffix": "", "n_predict": 1},
    "/api/chat": lambda text: {
        "messages": [{"role": "user", "content": text}],
        "options": {"num_predict": 1},
    },
    "/api/generate": lambda text: {"prompt": text, "options": {"num_predict": 1}},
    "/api/embed": lambda text: {"input": text},
    "/api/embeddings": lambda text: {"prompt": text},
    "/api/show": lambda text: {"name": "tiny"},
}
