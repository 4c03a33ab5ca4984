"""Read a memory account: what each part of a run takes, and which key makes it smaller, before anything is trained.

python examples/memory_account.py quickstart 32768 64     # configuration, global batch, ranks
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter

from amclr_scale.config.load import load
from amclr_scale.memory.account import account, in_words

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("configuration")
parser.add_argument("batch", type=int)
parser.add_argument("ranks", type=int)
NAME, BATCH, RANKS = vars(parser.parse_args()).values()

for micro_batch in (64, 512):
    words = [f"train.global_batch_size={BATCH}", f"execution.micro_batch_size={micro_batch}", f"data.lanes={RANKS}"]
    found = account(load(NAME, words, RANKS), world_size=RANKS, num_samples=3_000_000, device="cuda")
    print(f"micro-batches of {micro_batch}: {in_words(found.peak_bytes)} per rank, in phase {found.peak_phase}")
    parts = sorted(found.components, key=lambda part: -part.by_phase.get(found.peak_phase, 0))
    for part in parts[:4]:
        print(f"  {in_words(part.by_phase.get(found.peak_phase, 0)):>12}  {part.name}: {part.knob}")
