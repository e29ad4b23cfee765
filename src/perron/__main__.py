"""`python -m perron` is the command line."""

import sys

from perron.cli import main

sys.exit(main())
