"""Did a run learn? Compare its final evaluation with chance, or with a bound.

    python tools/check_learned.py runs/NAME --at-least 20

Exit code 0 when every retrieval and zero-shot score is at least so many times its chance level, 1 otherwise.
"""

import argparse
import json
import sys
from pathlib import Path

HEADLINES = ("image_to_text_R@1", "text_to_image_R@1", "zero_shot_top1")


def main() -> int:
    """Print each headline score beside its chance level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--at-least", type=float, default=20.0, help="times chance")
    parser.add_argument("--split", default="emoji/val_style", help="the split that is checked")
    options = parser.parse_args()
    results = json.loads((options.run / "evaluation.json").read_text())
    failed = False
    for headline in HEADLINES:
        key = f"{options.split}/{headline}"
        score, chance = results[key], results[f"{key}/chance"]
        enough = score >= options.at_least * chance
        failed |= not enough
        verdict = "" if enough else f", expected {options.at_least:.0f} x"
        print(f"{key}: {score:.2%}, {score / chance:.0f} x chance{verdict}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
