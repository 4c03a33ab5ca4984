"""`amclr-scale train`, for launchers that start a script: `deepspeed launch/train.py ...`."""

import sys

from amclr_scale.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
