"""Read a study's report.json: the scores of its arms, and what may be said of each against the reference.

python examples/read_study.py docs/studies/mini_amclr/report.json     # or studies/NAME/report.json of yours
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("report", type=Path)
report = json.loads(parser.parse_args().report.read_text())
for run in report["runs"]:
    low, high = 100 * run["score_low"], 100 * run["score_high"]
    print(f"{run['title']}, B = {run['global_batch_size']}: {100 * run['score']:.1f} % [{low:.1f}, {high:.1f}]")
for name, table in report.items():
    if name.startswith("verdicts_reference"):
        for row in table:
            # "undecided" is a finding too: the seeds do not tell a match within the margin from a difference.
            print(f"{row['arm']} against {row['against']}: {row['verdict']}, {100 * row['difference']:+.1f} points")
