"""`python -m argosy` runs `argosy`."""

import sys

from argosy.cli.main import main

sys.exit(main())
