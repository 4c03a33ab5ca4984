"""`amclr-scale evaluate`, for launchers that start a script: `deepspeed launch/evaluate.py ...`."""

import sys

from amclr_scale.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
