"""Keys of `data` that do not go together: one line per mistake, the key to change first. Imports no torch."""

from pydantic import BaseModel

from amclr_scale.config.objective_options import declared
from amclr_scale.config.schema import Config, Data
from amclr_scale.config.text_rules import TEXT_RULES
from amclr_scale.errors import one_of

READ_BY = {  # keys that say where further pictures and captions come from, and how they are made -> how many there are
    "image_view": "image_views", "image_view_from": "image_views", "image_negative": "image_negatives",
    "text_view": "text_views", "text_augmentation": "text_views", "text_negative": "text_negatives",
}  # fmt: skip


def augmentation(config: Config) -> list[str]:
    """Ranges of how images are changed."""
    lines = []
    for name in ("augmentation", "image_view"):
        recipe = getattr(config.data, name)
        if recipe is None:
            continue
        for key, (smallest, largest) in (("crop_scale", recipe.crop_scale), ("crop_ratio", recipe.crop_ratio)):
            if not smallest <= largest or not largest:
                lines.append(f"data.{name}.{key}: expected the smallest, then the largest, got [{smallest}, {largest}]")
        operations, magnitude = recipe.randaugment or (0, 0)
        if operations < 0 or not 0 <= magnitude <= 30:
            lines.append(
                f"data.{name}.randaugment: expected [operations, magnitude], the magnitude from 0 to 30, "
                f"got [{operations}, {magnitude}]"
            )
        if recipe.color_jitter < 0:
            lines.append(f"data.{name}.color_jitter: expected 0 (none) or more, got {recipe.color_jitter}")
    return lines


def batches(config: Config) -> list[str]:
    """Of communities: a file, and one pass per epoch."""
    data = config.data
    if data.batches == "random":
        unused = "has no meaning with data.batches=random; remove it, or use data.batches=similar"
        return [f"data.communities: {unused}"] if data.communities else []
    lines = []
    if not data.communities:
        lines.append(
            "data.communities: expected the .npy that amclr-scale shards communities wrote, which data.batches=similar "
            "reads, got none"
        )
    if data.weights:
        lines.append(
            f"data.weights: expected none with data.batches=similar, which passes over everything once per epoch, got "
            f"{data.weights}"
        )
    window = Data.model_fields["shuffle_window"].default
    if data.shuffle_window != window:
        lines.append(
            f"data.shuffle_window: has no meaning with data.batches=similar, which permutes all communities; remove it "
            f"(it is {window}), got {data.shuffle_window}"
        )
    return lines


def features(config: Config) -> list[str]:
    """Of frozen towers, made beforehand: whatever else would need the tower itself, or change from epoch to epoch."""
    data, lines = config.data, []
    for side in ("image", "text"):
        if getattr(data.features, side) is None:
            continue
        key, tower = f"data.features.{side}", getattr(config.model, side)
        if not tower.frozen or tower.unfrozen_blocks or tower.unfrozen_norms:
            lines.append(f"{key}: expected model.{side}.frozen=true of the whole tower, which gives them, got another")
        others: dict[str, tuple[object, object]] = {  # what there is, and what it has to be
            f"model.{side}.taps": (tower.taps, []),
            f"data.{side}_negatives": (getattr(data, f"{side}_negatives"), 0),
        }
        if side == "image":
            lines += _views_of_rows(data, key)
            chance = {"crop_scale": (1.0, 1.0), "flip": 0, "randaugment": None, "color_jitter": 0, "grayscale": 0}
            recipes = {"augmentation": data.augmentation, "image_view": data.image_view if data.image_views else None}
            for recipe, how in recipes.items():
                for name, none in {**chance, "amclr": 0}.items() if how else ():
                    others[f"data.{recipe}.{name}"] = getattr(how, name), none
        else:
            others["data.text_views"] = data.text_views, 0
            if not isinstance(data.caption, str):
                lines.append(f"data.caption: expected one place beside {key}, of one caption each, got {data.caption}")
        lines += [
            f"{name}: expected {list(none) if isinstance(none, tuple) else none} beside {key}, which holds one row for "
            f"each sample, got {found}"
            for name, (found, none) in others.items()
            if found != none
        ]
        read = declared(config.objective).inputs
        if any(name in read for name in (f"{side}_tokens", f"{side}_token_mask")):
            lines.append(f"{key}: objective {config.objective['name']} reads {side}_tokens, which they have not")
        if side == "text" and "text_content" in read:
            lines.append(
                f"{key}: objective {config.objective['name']} asks which captions are the same word for word, which a "
                "file of features does not say; leave it out, or objective.mask_duplicates and objective.positives "
                "that compare texts"
            )
    return lines


def _views_of_rows(data: Data, key: str) -> list[str]:
    """Of a side whose pictures nobody opens: further views are rows of other samples."""
    lines = []
    if data.image_views and data.image_view_from != "group":
        lines.append(
            f"data.image_view_from: expected group beside {key}, which holds one row for each sample, so that a "
            f"further view is another sample's of its data.image_group (such as json.concept), got "
            f"{data.image_view_from}; or set data.image_views=0"
        )
    if data.resident == "device":
        held = "host" if data.image_view_from == "group" else "host or none"
        lines.append(f"data.resident: expected {held} beside {key}: no picture is read, got device")
    if data.augment_on == "device":
        lines.append(f"data.augment_on: expected workers beside {key}: no picture is read, got device")
    return lines


def text_negatives(config: Config) -> list[str]:
    """Places of wrong captions that are none."""
    named = config.data.text_negative
    wrong = sorted(set([named] if isinstance(named, str) else named) - set(TEXT_RULES))
    fits = f"data.text_negative: expected {one_of(TEXT_RULES)}, or json.FIELD, got"
    return [f"{fits} {name}" for name in wrong if "." not in name]


def unread_places(config: Config) -> list[str]:
    """What is said of further views and of hard negatives that nobody asks for."""
    data, lines = config.data, []
    for key, number in READ_BY.items():
        said = getattr(data, key)
        if said != Data.model_fields[key].default and not getattr(data, number):
            got = said.model_dump(mode="json", exclude_defaults=True) if isinstance(said, BaseModel) else said
            lines.append(
                f"data.{key}: data.{number} reads it, got {got} with data.{number}=0; remove it, or set data.{number}=1"
            )
    return lines
