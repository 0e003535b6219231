"""Do Argosy and llama.cpp give the same predictions for the same file?

    python benchmarks/agree.py [--geometries small] [--formats Q4_0,Q4_K_M,Q8_0,...] [--tokens 96] [--exact] [--short]

Both read a document and return logits at every position. Their arithmetic differs (llama.cpp rounds activations to 8
bits in its own blocks), so their distributions differ a little: KL(llama.cpp || Argosy) in nats, and how often the most
likely token is the same among positions where llama.cpp's first two are more than 0.05 apart.

Which of the two is off? `--exact` dequantizes the file to float32 (with gguf-py; 5 GB for small), which llama.cpp then
reads. Its arithmetic then has nothing left to round, and both are compared with that. Routers with random weights have
many near ties, so a rounded activation can change an expert, and differences are larger than with a trained model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from common import Report
from divergence import divergence
from engines import ARGOSY, LLAMA_CPP, Job, logits, parse_cases, peer_python
from make_checkpoint import GGUF_FORMATS
from random_weights import document

TIE = 0.05


def dequantise(source: Path, target: Path) -> None:
    """Write a copy of a GGUF with its weights in float32, tensor by tensor."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.alignment"):
            continue
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            name, field.contents(), field.types[0], sub_type=field.types[-1] if is_array else None
        )
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(
            np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--exact", action="store_true", help="both against the dequantised weights, too")
    options, cases = parse_cases(parser, geometries="small", formats=",".join(GGUF_FORMATS), threads="2")
    report = Report("agree", state="one document, all positions in one batch")
    if peer_python() is None:
        print("skipped: llama.cpp is not installed (benchmarks/install_peer.sh)", file=sys.stderr)
        return 0
    tokens = document(3, options.tokens)
    is_good = True
    for number, case in enumerate(cases):
        job = Job(model=case.model, prompts=[tokens], num_new=1, threads=case.threads, warm_up=0)
        ours, theirs = logits(ARGOSY, job), logits(LLAMA_CPP, job)
        if number == 0:
            expected = np.array(document(3, options.tokens + 1)[1:])
            right = int((ours.argmax(axis=1) == expected).sum())
            report.correct(f"{case.name}: {right}/{len(expected)} of Argosy's guesses continue the document")
            report.opening()
            is_good = right == len(expected)
        divergences, agrees = divergence(theirs, ours)
        two = np.sort(theirs, axis=1)[:, -2:]
        same = float(agrees[two[:, 1] - two[:, 0] > TIE].mean())
        mean = report.ratio(
            f"{case.name}: mean KL", float(divergences.mean()), 1.0, target="<= 0.002", row=0, **case.facts
        )
        report.ratio(f"{case.name}: largest KL", float(divergences.max()), 1.0, **case.facts)
        agreed = report.ratio(f"{case.name}: same first token", same, 1.0, target=">= 0.99", **case.facts)
        is_good = is_good and mean <= 0.002 and agreed >= 0.99
        if not options.exact:
            continue
        with tempfile.TemporaryDirectory(dir=case.model.parent) as folder:
            target = Path(folder) / "float32.gguf"
            dequantise(case.model, target)
            exact = logits(LLAMA_CPP, replace(job, model=target))
        for engine, said in ((ARGOSY, ours), (LLAMA_CPP, theirs)):
            name = f"{case.name}: mean KL from the weights in float32, {engine}"
            report.ratio(name, float(divergence(exact, said)[0].mean()), 1.0, **case.facts)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
