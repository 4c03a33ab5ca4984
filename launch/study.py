"""`amclr-scale study`, for launchers that start a script: `deepspeed launch/study.py ...`."""

import sys

from amclr_scale.commands.study import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
