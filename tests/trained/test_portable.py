"""What leaves a machine, an exported configuration and its card, names data sets and shows no paths."""

from amclr_scale.config.load import build, dump, load
from amclr_scale.trained.export import card
from amclr_scale.trained.portable import portable
from tests.trained.test_export import TREE

PATHS = {
    "data": {"train": ["/home/me/cc3m/{000..331}.tar", "emoji/train"], "cache": "/scratch/me",
             "paraphrases": "/home/me/p", "text_augmentation": {"synonyms": "/home/me/synonyms.json"}},
    "model": {"text": {"name": "transformers//home/me/bert"}, "image": {"weights": "~/me/vit.pt"}},
    "evaluation": {
        "splits": ["/home/me/photos", "emoji/val_style", "https://host/coco/{0..3}.tar", "pipe:cat /home/me/web/0.tar",
                   "https://me:secret@host/a.tar", "https://host/b.tar?sig=secret"],
        "image_root": "/home/me", "class_names": "/home/me/names.txt",
        "probes": [{"train": "/home/me/in/train", "test": "emoji/val_style", "classes": "json.group"}],
    },
    "run": {"folder": "/home/me/runs", "remote": "s3://secret/runs"},
    "resume": "/home/me/runs/a", "deepspeed": {"path": {"nvme": "/home/me/nvme"}},
}  # fmt: skip


def test_an_exported_configuration_has_names_and_no_paths(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a {}\n/the {}\n")
    tree = {name: {**TREE.get(name, {}), **keys} if isinstance(keys, dict) else keys for name, keys in PATHS.items()}
    tree["evaluation"] = {**tree["evaluation"], "templates": str(prompts)}
    tree["train"] = TREE["train"]
    left = portable(build(tree, trusted=False))  # a run of before, whose addresses no configuration may have any more
    written = dump(left)
    for private in ("/home", "/scratch", "~", str(tmp_path), "cat ", "secret"):
        assert private not in written
    (tmp_path / "config.yaml").write_text(written)
    assert left == load(tmp_path / "config.yaml", trusted=False)
    assert left.data.train == {"cc3m": None, "emoji/train": "emoji/train"}
    assert left.evaluation.splits == {
        "photos": None, "emoji/val_style": "emoji/val_style", "coco": "https://host/coco/{0..3}.tar", "web": None,
        "host/a": None, "host/b": None,
    }  # fmt: skip
    probe = left.evaluation.probes[0]
    assert (probe.train, probe.test) == ({"train": None}, "emoji/val_style")
    assert left.evaluation.templates == ["a {}", "/the {}"]
    assert (left.model.text.name, left.model.image.weights) == ("transformers/bert", "vit.pt")
    assert left.deepspeed == {"path": {"nvme": "nvme"}}
    plain = build({**TREE, "evaluation": {"splits": ["emoji/val_style"]}})
    assert portable(plain) == plain  # nothing of it is a path


def test_a_card_shows_no_paths_of_the_machine():
    data = {
        "train": ["/home/me/cc3m/{000..331}.tar", "/data/photos"],
        "tokenizer": "/home/me/models/bert/tokenizer.json",
    }
    tree = {**TREE, "data": {**TREE["data"], **data}, "model": {"text": {"name": "transformers//home/me/models/bert"}}}
    state = {
        "packages": {}, "step": 1, "total_steps": 2, "samples": 8, "num_samples": 8, "data_fingerprint": "f",
        "recipe": "r", "time": "now",
    }  # fmt: skip
    said = card(state, build(tree), {"photos/image_to_text_R@1": 0.5})
    assert "- data: cc3m, photos (fingerprint f)" in said
    assert "- text tower: transformers/bert, 12 tokens" in said
    assert "/home" not in said
    assert "/data" not in said
