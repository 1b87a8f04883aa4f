"""``python -m sophia_integrations`` is ``sophia``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
