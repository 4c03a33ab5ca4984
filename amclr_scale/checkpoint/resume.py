"""Which checkpoint a run goes on from, and whether it may.

Nothing here talks to other ranks: rank 0 looks, reads every byte of the candidate once to check it, and tells the
others. A recipe that differs is refused, key by key; how it is executed may differ as it likes. Imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.checkpoint import contents, files
from amclr_scale.checkpoint.files import CHECKPOINTS
from amclr_scale.config.data_checks import READ_BY
from amclr_scale.config.load import build, recipe, recipe_hash
from amclr_scale.config.schema import Config
from amclr_scale.data.beside.fingerprint import SHARDS, parts
from amclr_scale.errors import UserError


@dataclass(frozen=True)
class Found:
    """A checkpoint to go on from."""

    checkpoint: Path
    run: Path  # the run folder that it lies in
    samples: int  # seen when it was saved
    number: int  # of checkpoints that its run had made
    fingerprint: str  # of the data
    tokenizer: str | None  # its fingerprint; None: saved by a version that did not write one
    changed: tuple[str, ...]  # keys of the recipe that differ, as resume_changed allows
    complaints: tuple[str, ...]  # newer checkpoints that cannot be used, and why
    unsaid: tuple[str, ...] = ()  # files of data whose content a version that did not look at it has left out

    def notes(self) -> list[str]:
        """What the user should know about it, in words."""
        changed = [f"resumed with a changed recipe: {words}" for words in self.changed]
        unknown = [] if self.tokenizer else [f"{self.checkpoint} does not say what its tokenizer was: not checked"]
        unknown += [f"{self.checkpoint} does not say what was in data.{key}: not checked" for key in self.unsaid]
        return [*self.complaints, f"resumed from {self.checkpoint}", *unknown, *changed]

    def step(self, config: Config) -> int:
        """Steps of this configuration's batch size that the samples seen make up.

        Raises:
            UserError: they make up no whole number of them.
        """
        step, rest = divmod(self.samples, config.train.global_batch_size)
        if rest:
            raise UserError(
                f"train.global_batch_size: expected a divisor of the {self.samples:,} samples that {self.checkpoint} "
                f"has seen, got {config.train.global_batch_size}; choose one, or go on from another checkpoint"
            )
        return step

    def check(self, config: Config, *, data: str | None, tokenizer: str) -> int:
        """Steps that are done, once nothing stands against going on.

        Args:
            data, tokenizer: fingerprints of what the run would read; data None: it is not looked at.

        Raises:
            UserError: the batch size does not fit, or data or tokenizer are others.
        """
        step = self.step(config)
        if data is not None:
            self.check_data(config, data)
        self.check_tokenizer(config, tokenizer)
        return step

    def check_data(self, config: Config, fingerprint: str) -> None:
        """Raise `UserError` if the data set's content, or features beside it, are not those of before."""
        now, before = parts(fingerprint), parts(self.fingerprint)
        for key, expected in before.items():
            accepted = any(_allowed(name, config.resume_changed) for name in (f"data.{key}", f"data.{SHARDS}"))
            if now.get(key) != expected and not accepted:
                what = "the shards are" if key == SHARDS else f"the features in {getattr(config.data, key, None)} are"
                raise UserError(
                    f"data.{key}: {what} not those that {self.checkpoint} was trained on: fingerprint "
                    f"{now.get(key)}, expected {expected}; bring them back, or accept it with resume_changed=data.{key}"
                )

    def check_tokenizer(self, config: Config, fingerprint: str) -> None:
        """Raise `UserError` if captions would become other numbers than those that the model has learned."""
        if self.tokenizer and fingerprint != self.tokenizer and not _allowed("data.tokenizer", config.resume_changed):
            raise UserError(
                f"data.tokenizer: {config.data.tokenizer} is not what it was when {self.checkpoint} was trained: "
                f"fingerprint {fingerprint}, expected {self.tokenizer}; set data.tokenizer={self.checkpoint}/tokenizer "
                "with resume_changed=data.tokenizer, bring the old file back, or accept the new one with "
                "resume_changed=data.tokenizer alone"
            )


def find(config: Config, newest: files.Newest = files.newest_valid) -> Found | None:
    """The checkpoint that `resume` means; None: begin at the beginning.

    Args:
        newest: finds the newest one of a run, by reading every byte of it.

    Raises:
        UserError: there is none at the path, it is damaged, or it was made by another recipe.
    """
    if config.resume == "never":
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        return opened(*files.locate(path, "resume", "never, auto, or a folder with a checkpoint"), config)
    home = Path(config.run.folder)
    if config.run.name:
        checkpoint, complaints = newest(home / config.run.name / CHECKPOINTS)
        if checkpoint is None and complaints:
            raise UserError("resume: no checkpoint of this run can be used\n" + "\n".join(complaints))
        return None if checkpoint is None else opened(checkpoint, complaints, config)
    for folder in _of_same_recipe(home, config):
        checkpoint, complaints = files.newest_valid(folder)
        if checkpoint is not None and not _finished(checkpoint):
            return opened(checkpoint, complaints, config)
    return None


def _of_same_recipe(home: Path, config: Config) -> Iterator[Path]:
    """Folders of checkpoints whose newest is of this recipe, the newest first."""
    wanted, found = recipe_hash(config), []
    for pointer in home.glob(f"*/{CHECKPOINTS}/{files.LATEST}"):
        states = (pointer.parent / files.name_of(step) / "state.json" for step in files.steps(pointer.parent))
        for state in states:
            try:
                same = contents.parse(state.read_text("utf-8"))["recipe"] == wanted
            except (OSError, ValueError, KeyError, TypeError):
                continue  # damaged: the next one tells
            if same:
                found.append((pointer.stat().st_mtime, pointer.parent))
            break
    return iter([folder for _, folder in sorted(found, reverse=True)])


def _finished(checkpoint: Path) -> bool:
    state = _state(checkpoint, "step", "total_steps")
    return bool(state["step"] >= state["total_steps"])


def _state(checkpoint: Path, *needed: str) -> dict[str, Any]:
    state = files.read_state(checkpoint)
    if missing := [key for key in needed if key not in state]:
        raise UserError(f"resume: {checkpoint} cannot be used: its {files.STATE} lacks {missing[0]}")
    return state


def opened(checkpoint: Path, complaints: list[str], config: Config, called: str = "") -> Found:
    """A checkpoint that is whole, as one to go on from.

    Args:
        complaints: what was passed over for it.
        called: in messages, instead of its path.

    Raises:
        UserError: it was made by another recipe.
    """
    state = _state(checkpoint, "config", "samples", "number", "data_fingerprint")
    changed = differences(state["config"], config)
    obstacles = _obstacles(state["config"], config, changed, called or str(checkpoint))
    # An objective of another name has other options, and none of them is to be accepted by itself.
    settled = [*config.resume_changed, *(["objective"] if "objective.name" in obstacles else obstacles)]
    refused = {key: words for key, words in changed.items() if not _allowed(key, settled)}
    lines = list(obstacles.values())
    if refused:
        lines.append(
            f"resume: {called or checkpoint} was made by another recipe; go back to it, or accept the changes with "
            f"resume_changed={','.join(refused)}"
        )
    if lines:
        raise UserError("\n".join([*lines, *refused.values()]))
    said, data = parts(state["data_fingerprint"]), state["config"].get("data", {})
    unsaid = tuple(key for key in ("image_reference", "text_reference") if data.get(key) and key not in said)
    return Found(
        checkpoint, checkpoint.parent.parent, state["samples"], state["number"], state["data_fingerprint"],
        state.get("tokenizer_fingerprint"), tuple(changed.values()), tuple(complaints), unsaid,
    )  # fmt: skip


def _obstacles(saved: dict[str, Any], config: Config, changed: dict[str, str], address: str) -> dict[str, str]:
    """Changed keys that nobody can accept, because the objective's state does not carry over, with words for each."""
    if not any(key.startswith("objective.") for key in changed):
        return {}
    from amclr_scale.checkpoint.objective_state import obstacles  # needs torch, as a run with objectives does

    never = "" if config.resume == "auto" else ", resume=never"
    fix = (
        "go back to it, or start a run of its own from these weights: "
        f"amclr-scale export {address} --out FOLDER, then model.init=FOLDER{never} and another run.name"
    )
    return obstacles(saved, config, changed, fix)


def differences(saved: dict[str, Any], config: Config) -> dict[str, str]:
    """Keys of the recipe that differ between a saved configuration and this one, each with words for both values.

    Those that nothing reads in either do not differ: releases that had no objection to them wrote them down.
    """
    try:
        before, now = recipe(build(saved, trusted=False)), recipe(config)
    except UserError as error:
        raise UserError(f"resume: the checkpoint's configuration is not one of this version's\n{error}") from error
    counts = {key: f"data.{number}" for key, number in READ_BY.items()}
    unread = [f"data.{key}" for key, count in counts.items() if not before.get(count) and not now.get(count)]
    shown = [{key: repr(value) for key, value in flat.items()} for flat in (before, now)]
    return {
        key: f"{key}: {shown[0].get(key, 'nothing')} in the checkpoint, {shown[1].get(key, 'nothing')} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not _allowed(key, unread)
    }


def _allowed(key: str, changed: list[str]) -> bool:
    """Whether a key, or a section around it, was named."""
    return any(key == name or key.startswith(f"{name}.") for name in changed)
