"""Run the command line with `python -m trans_peft.cli`."""

import sys

from trans_peft.cli import main

sys.exit(main())
