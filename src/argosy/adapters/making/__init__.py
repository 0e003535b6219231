"""Make an adapter: rows of text -> LoRA pairs, trained with torch on a CPU -> a PEFT directory.

    rows.py         a file of rows -> token ids, and which of them to learn
    weights.py      a model's files -> float32
    mixture.py      the model in torch, with pairs
    checking.py     how far torch and the engine are apart
    training.py     rows and model -> trained pairs
    peft_files.py   trained pairs -> a directory that PEFT and Argosy read

Only `mixture.py` and `training.py` import torch, and only `argosy adapt` imports them.
"""
