"""The examples of docs/similarity.md run, in order, as a reader would type them."""

import re
from pathlib import Path

import torch

from amclr_scale.similarity import configure

PAGE = Path(__file__).parents[2] / "docs" / "similarity.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(blocks) == 5
    names = {}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"similarity.md, example {number}", "exec"), names)
            assert names["loss"].isfinite()
            if number == 0:
                s = names["logit_scale"] * names["image"] @ names["text"].T
                own = torch.arange(len(s))
                want = sum(torch.nn.functional.cross_entropy(x, own) for x in (s, s.T)) / 2
                torch.testing.assert_close(names["loss"], want)
                assert names["image"].grad.isfinite().all()
    finally:
        configure(cache_bytes=0)
