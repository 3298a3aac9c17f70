"""`python -m sae_bias.cli`."""

import sys

from sae_bias.cli.main import main

sys.exit(main())
