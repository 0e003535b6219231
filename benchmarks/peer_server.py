"""llama-cpp-python's own server. With `--repack false` its weights are not repacked: the second copy would not fit.

The server has no option for that, so this file changes the default that it uses (`load.py` starts it).
"""

from __future__ import annotations

import sys

from llama_cpp import llama_cpp as native
from llama_cpp.server.__main__ import main

if "--repack" in sys.argv:
    at = sys.argv.index("--repack")
    repack = sys.argv[at + 1] == "true"
    del sys.argv[at : at + 2]
    defaults = native.llama_model_default_params

    def changed_defaults() -> native.llama_model_params:
        params = defaults()
        params.use_extra_bufts = repack
        return params

    native.llama_model_default_params = changed_defaults

if __name__ == "__main__":
    main()
