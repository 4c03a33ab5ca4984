"""Text retrieval with sentence-transformers: one model for questions and answers, a batch of 8,192, 64 rows at a time.

python examples/sentence_transformers_loop.py 8192 20 sentence-transformers/all-MiniLM-L6-v2
python examples/sentence_transformers_loop.py     # without a model's name or folder: a small one with random weights
"""

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path

import torch

from amclr_scale import GradientCache
from amclr_scale.similarity import contrast
from amclr_scale.torchvision_ops import import_torchvision

with suppress(ImportError):  # where it is installed, and built for another torch: the packages below import it
    import_torchvision()
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizerFast

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("batch", type=int, nargs="?", default=8192)
parser.add_argument("steps", type=int, nargs="?", default=20)
parser.add_argument("model", nargs="?")
BATCH, STEPS, NAME = vars(parser.parse_args()).values()
WORDS = [f"word{n}" for n in range(400)]


def small_model() -> SentenceTransformer:
    """BERT of two layers; mean pooling, as sentence-transformers adds to any model of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        tokenizer = BertTokenizerFast(str(vocabulary))
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return SentenceTransformer(folder)


def loss(rows):
    """InfoNCE both ways (MultipleNegativesRankingLoss and its mirror image), without a matrix of 8,192 x 8,192."""
    both = contrast(*rows, temperature=0.05)
    return sum((side.log_sum - side.positive / 0.05).mean() for side in (both.image, both.text)) / 2


torch.manual_seed(0)
model = SentenceTransformer(NAME) if NAME else small_model()
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5 if NAME else 3e-3)


def encode(questions, answers):
    found = (model(dict(side))["sentence_embedding"] for side in (questions, answers))
    return tuple(torch.nn.functional.normalize(side, dim=1) for side in found)


cache = GradientCache(encode, micro_batch_size=64, models=[model])
for step in range(STEPS):
    picked = torch.randint(len(WORDS), (BATCH, 6)).tolist()  # yours: questions and their answers
    questions = [" ".join(WORDS[n] for n in row) for row in picked]
    answers = [" ".join(WORDS[n] for n in row[3:]) for row in picked]
    sides = (model.preprocess(side) for side in (questions, answers))
    tensors = [{name: side[name].to(model.device) for name in ("input_ids", "attention_mask")} for side in sides]
    optimizer.zero_grad()
    value = cache(loss, *tensors)
    optimizer.step()
    print(f"step {step + 1}: loss {value.item():.4f}")
