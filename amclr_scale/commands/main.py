"""The command of the package: one verb, then that verb's own command line.

    amclr-scale train --config quickstart train.global_batch_size=256
    amclr-scale train --help

Nothing is imported before the verb is known, so that a wrong word answers at once.
"""

import signal
import sys
from importlib import import_module

import amclr_scale
from amclr_scale.errors import did_you_mean

# Verb, or verb and second word: the module in this folder whose main(argv) it calls, and what it does.
VERBS = {
    "train": ("train", "train a dual encoder from one configuration"),
    "evaluate": ("evaluate", "measure trained models: retrieval, zero-shot, probes, geometry"),
    "leaderboard": ("leaderboard", "compare what runs have measured, sorted by a column"),
    "study": ("study", "run a plan of arms x batch sizes x seeds, and write its report"),
    "fit": ("fit", "what fits, how fast, how many bytes travel, before there is a machine"),
    "export": (
        "export",
        "turn a checkpoint into a folder for others (safetensors, transformers, open_clip), or push it",
    ),
    "embed": ("embed", "write the embeddings of images, texts or shards"),
    "search": ("search", "find the images or texts nearest to a text or a picture"),
    "shards make": ("make_shards", "turn images and annotation files into shards"),
    "shards index": ("index_shards", "count, fingerprint and index shards"),
    "shards tokenizer": ("train_tokenizer", "train a vocabulary on the captions of shards"),
    "shards paraphrase": ("paraphrase", "write paraphrases of every caption beside shards"),
    "shards communities": ("communities", "group the samples of shards by likeness, for data.batches=similar"),
    "corpus": ("corpus", "make a corpus from public packages: icons, emoji"),
    "supervise": ("supervise", "run a training command until it is done, through crashes and preemptions"),
}

# What the commands import beside torch, by the extras of pyproject.toml.
OF_DATA = ("braceexpand", "webdataset", "tokenizers", "pydantic", "yaml", "numpy", "PIL", "psutil", "pyarrow", "rich")
PACKAGES = (*OF_DATA, "torchvision", "deepspeed", "transformers", "accelerate", "safetensors")

# What a part of a command imports beside them: the package that brings it.
FURTHER = {
    "open_clip": "open_clip_torch", "timm": "timm", "matplotlib": "matplotlib", "scipy": "scipy", "fsspec": "fsspec",
    "huggingface_hub": "huggingface_hub", "resvg_py": "resvg-py",
}  # fmt: skip


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<18} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "usage: amclr-scale VERB ...",
            "",
            *lines,
            "",
            "amclr-scale VERB --help says what each takes; --version says which this is.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Call the verb's main. Exit codes: the verb's own; 2 for no such verb; 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0].startswith(("--local_rank=", "--local-rank=")):
        words = words[1:]  # `deepspeed --module amclr_scale train` puts it first; LOCAL_RANK says the same
    if words[:1] == ["--version"]:
        print(f"amclr_scale {amclr_scale.__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    for length in (2, 1):
        verb = " ".join(words[:length])
        if len(words) >= length and verb in VERBS:
            try:
                code: int = import_module(f"amclr_scale.commands.{VERBS[verb][0]}").main(words[length:])
            except KeyboardInterrupt:  # Ctrl-C where nothing has to be saved
                return 128 + signal.SIGINT
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if missing not in PACKAGES and missing not in FURTHER:
                    raise
                extra = "data" if words[0] == "shards" and missing in OF_DATA else "train"
                install = FURTHER.get(missing, f"'amclr_scale[{extra}]'")
                told = f"amclr-scale {verb} needs {error.name}, which is not installed"
                print(f"{told}: pip install {install}", file=sys.stderr)
                return 2
            return code
    wanted = " ".join(words[:2]) if any(verb.startswith(f"{words[0]} ") for verb in VERBS) else words[0]
    print(f"amclr-scale: no such verb {wanted!r}{did_you_mean(wanted, VERBS)}\n\n{usage()}", file=sys.stderr)
    return 2
