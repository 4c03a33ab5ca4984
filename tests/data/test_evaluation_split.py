"""Every held-out sample once, whatever the number of ranks and the batch size."""

import pytest
import torch

from amclr_scale.config import schema
from amclr_scale.data.evaluation_split import EvaluationSplit, class_names
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar


def test_the_embedded_split_is_complete_and_has_its_classes():
    data = schema.Data(image_size=16, context_length=16)
    split = EvaluationSplit("emoji/val_concept", data, classes="json.concept")
    names = class_names("emoji/val_concept", data, "json.concept")
    assert split.num_samples == len(split.captions) == len(split.labels) == 678
    assert len(names) == len(set(names)) == 1906
    assert len({names[label] for label in split.labels}) == 175
    spelled = [names[label] in caption for label, caption in zip(split.labels, split.captions, strict=True)]
    assert 0.4 < sum(spelled) / 678 < 0.9  # half of the captions are built on the name
    assert split.image_ids.tolist() == list(range(678))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 7), (2, 4), (3, 5), (5, 100)])
def test_every_sample_once_over_the_ranks(tmp_path, world_size, batch_size):
    write_shards(tmp_path, [5, 0, 9, 3])
    whole = next(EvaluationSplit(str(tmp_path), settings("emoji/train")).batches(17))
    ids, images, texts, sizes = [], [], [], []
    for rank in range(world_size):
        split = EvaluationSplit(str(tmp_path), settings("emoji/train"), rank=rank, world_size=world_size)
        for batch in split.batches(batch_size):
            ids += batch.ids.tolist()
            images.append(batch.images[0])
            texts.append(batch.texts[0])
            sizes.append(len(batch))
    assert ids == list(range(17))
    assert max(sizes) <= batch_size
    torch.testing.assert_close(torch.cat(images), whole.images[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(texts), whole.texts[0], rtol=0, atol=0)


def test_the_view_is_the_centred_square(tmp_path):
    write_tar(tmp_path / "0.tar", pair(7))
    image = next(EvaluationSplit(str(tmp_path), settings("emoji/train", image_size=10)).batches(1)).images[0][0]
    # 12 x 10 pixels, the left half darker: after cutting one column from each side, five of ten are dark.
    assert image[2].tolist() == [[40] * 5 + [200] * 5] * 10


def test_several_captions_and_rows_of_one_image(tmp_path):
    members = [*pair(0, image_id="a"), *pair(1, image_id="b"), *pair(2, image_id="a"), *pair(3)]
    members[1] = ("000000.txt", b"first line\nsecond line\n")
    write_tar(tmp_path / "0.tar", members)
    split = EvaluationSplit(str(tmp_path), settings("emoji/train"))
    assert split.caption_lists[:2] == [["first line", "second line"], ["sample 1"]]
    assert split.captions[0] == "first line"
    assert split.image_ids.tolist() == [0, 1, 0, 2]
    listed = EvaluationSplit(str(tmp_path), settings("emoji/train", caption="json.captions"))
    assert listed.caption_lists[3] == ["sample 3", "number 3", "the picture 3"]


def test_classes_of_clip_benchmarks_layout(tmp_path):
    members = [m for i in range(4) for m in [*pair(i), (f"{i:06d}.cls", str(i % 2).encode())]]
    write_tar(tmp_path / "0.tar", members)
    data = settings("emoji/train")
    assert EvaluationSplit(str(tmp_path), data, classes="cls").labels == [0, 1, 0, 1]
    with pytest.raises(UserError, match=r"expected a classnames\.txt beside"):
        class_names(str(tmp_path), data, "cls")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    assert class_names(str(tmp_path), data, "cls") == ["cat", "dog"]


def test_classes_by_name(tmp_path):
    write_tar(tmp_path / "0.tar", [*pair(0, kind="dog"), *pair(1, kind="cat"), *pair(2, kind="dog")])
    data = settings("emoji/train")
    assert EvaluationSplit(str(tmp_path), data, classes="json.kind").labels == ["dog", "cat", "dog"]
    assert class_names(str(tmp_path), data, "json.kind") == ["cat", "dog"]


def test_a_split_with_a_bad_sample_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [*pair(0), ("1.png", b"no"), ("1.txt", b"a"), ("1.json", b"{}")])
    split = EvaluationSplit(str(tmp_path), settings("emoji/train"))
    with pytest.raises(UserError, match=r"sample 1 of .*0\.tar cannot be used: corrupt image"):
        list(split.batches(2))
    with pytest.raises(UserError, match=r"^evaluation\.classes: .*at json\.kind of every sample, got None; .*null"):
        EvaluationSplit(str(tmp_path), settings("emoji/train"), classes="json.kind")


def test_mistakes_name_their_key():
    with pytest.raises(UserError, match=r"^evaluation\.splits: expected a split of the embedded corpus"):
        EvaluationSplit("emoji/val", settings("emoji/train"))
    with pytest.raises(
        UserError, match=r"evaluation\.classes: expected one of json\.concept, json\.group, json\.subgroup"
    ):
        class_names("emoji/val_style", settings("emoji/train"), "json.colour")


def test_a_split_that_is_cut_or_holds_a_sample_twice_is_refused(tmp_path):
    whole = write_tar(tmp_path / "cut" / "0.tar", [m for i in range(3) for m in pair(i)])
    text = whole.read_bytes().rindex(b"sample 2")
    whole.write_bytes(whole.read_bytes()[: text + 4])  # a caption that could still be read, in part
    write_tar(tmp_path / "twice" / "0.tar", [m for i in (0, 1, 0) for m in pair(i)])
    for name, words in (("cut", "sample 000002 .* cannot be used: truncated"), ("twice", "duplicate key")):
        with pytest.raises(UserError, match=f"^evaluation.splits: .*{words}"):
            EvaluationSplit(str(tmp_path / name), settings("emoji/train"))


def test_captions_of_a_text_are_its_lines(tmp_path):
    """Lines as files have them: Python's splitlines takes more for the end of one than any other reader does."""
    members = [
        (name, "one\u2028two\x0bthree\r\nfour\n\n".encode() if "txt" in name else data) for name, data in pair(0)
    ]
    split = EvaluationSplit(str(write_tar(tmp_path / "0.tar", members)), settings("emoji/train"))
    assert split.caption_lists == [["one\u2028two\x0bthree", "four"]]
