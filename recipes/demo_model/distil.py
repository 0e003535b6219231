"""Let the dense model answer our user messages, so that training on its replies preserves its chat behaviour.

    python distil.py --work WORK --out WORK/replies.jsonl

Messages with one right answer are answered greedily, open ones at temperature 0.7. Only replies that end by
themselves are kept. The replies are Apache-2.0, like the model that wrote them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from base_model import END_OF_TURN, chat_prompt, find_gguf, load_llama, load_tokenizer
from prompts import user_messages


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the base model and what is made of it"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, default=144)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=6.0, help="stop after this long with what is there")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    gguf_path = find_gguf(asked.work)
    tokenizer, model = load_tokenizer(gguf_path), load_llama(gguf_path)
    end_id = tokenizer.token_to_id(END_OF_TURN)

    messages = user_messages()
    order = torch.randperm(len(messages), generator=torch.Generator().manual_seed(0)).tolist()
    messages = [messages[at] for at in order]
    started, num_kept = time.monotonic(), 0
    with asked.out.open("w", encoding="utf-8") as out, torch.inference_mode():
        for is_factual in (True, False):
            group = [message for message, factual in messages if factual == is_factual]
            for first in range(0, len(group), asked.batch):
                if time.monotonic() - started > asked.minutes * 60:
                    break
                batch = group[first : first + asked.batch]
                prompts = [tokenizer.encode(chat_prompt(message)).ids for message in batch]
                width = max(map(len, prompts))
                ids = torch.tensor([[end_id] * (width - len(p)) + p for p in prompts])
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
                sampling = {} if is_factual else {"temperature": 0.7, "top_p": 0.95, "top_k": 0}
                replies = model.generate(
                    ids, attention_mask=mask, max_new_tokens=asked.max_new_tokens, do_sample=not is_factual,
                    eos_token_id=end_id, pad_token_id=end_id, **sampling,
                )[:, width:].tolist()  # fmt: skip
                for message, reply in zip(batch, replies, strict=True):
                    if end_id not in reply:
                        continue
                    text = tokenizer.decode(reply[: reply.index(end_id)])
                    out.write(json.dumps({"message": message, "reply": text}) + "\n")
                    num_kept += 1
                out.flush()
                print(
                    f"{time.monotonic() - started:5.0f} s  {first + len(batch)} of {len(group)}  kept {num_kept}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
