"""`python -m amclr_scale VERB ...` is `amclr-scale VERB ...`."""

import sys

from amclr_scale.commands.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
