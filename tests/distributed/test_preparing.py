"""What a rank has done before it meets the others."""

import gzip

from amclr_scale.data.indexing import open_index
from amclr_scale.distributed.preparing import HERE, Work
from tests.data.shards import settings, write_shards


def test_work_is_counted_by_kind():
    work = Work()
    assert work.words() == ""
    work.advance("bytes fetched", 12_000)
    work.advance("shards indexed")
    work.advance("bytes fetched", 5)
    assert work.words() == "12,005 bytes fetched"


def test_fetching_unpacking_and_indexing_are_counted(tmp_path):
    """So that none of them looks like a rank that hangs."""
    HERE.done.clear()
    plain = write_shards(tmp_path, [3, 2])
    packed = f"{plain[0]}.gz"
    with open(plain[0], "rb") as source, gzip.open(packed, "wb") as out:
        content = source.read()
        out.write(content)
    urls = [packed, f"file://{plain[1]}"]
    assert open_index(settings(urls, cache=str(tmp_path / "cache"))).num_samples == 5
    assert HERE.done["shards indexed"] == 2
    assert HERE.done["bytes unpacked"] == len(content)
    assert HERE.done["bytes fetched"] == (tmp_path / plain[1]).stat().st_size
