"""How views of pictures and captions are changed: the sections that `data` has for it. Imports no torch."""

from amclr_scale.config.section import Fraction, PositiveNumber, Section


class ImageAugmentation(Section):
    """The base image view: torchvision v2, per sample, before normalisation."""

    crop_scale: tuple[Fraction, Fraction] = (0.6, 1.0)
    """Area share of the random resized crop, smallest and largest. [1, 1] switches cropping off."""
    crop_ratio: tuple[PositiveNumber, PositiveNumber] = (0.75, 4 / 3)
    """Aspect ratio of the random resized crop, smallest and largest."""
    flip: Fraction = 0.5
    """Probability of a left-right flip."""
    randaugment: tuple[int, int] | None = None
    """RandAugment's number of operations and magnitude, such as [2, 7]; null: none."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter (hue: a quarter of it)."""
    grayscale: Fraction = 0.0
    """Probability of turning the image grey."""
    amclr: Fraction = 0.0
    """Probability of one of AmCLR's eight operations (blur, flip, noise, brightness, contrast, sharpness, central crop,
    central crop with a border), drawn per sample, on 8-bit pixels, keeping the size."""
    amclr_strength: PositiveNumber = 1.0
    """Strength of these operations; 1: as published (noise 0.05, brightness and contrast 0.8 .. 1.2, crop 0.9)."""


class TextAugmentation(Section):
    """Word-level changes to further captions, each drawn per word."""

    drop: Fraction = 0.0
    """Probability of leaving a word out (one always stays)."""
    swap: Fraction = 0.0
    """Probability of exchanging a word with the next one."""
    synonym: Fraction = 0.0
    """Probability of replacing a word that the table has."""
    synonyms: str | None = None
    """The table: a JSON file {"word": ["other word", ...], ...}, words in lower case."""
