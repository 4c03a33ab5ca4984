"""The suites: which data sets each has, where they lie below a folder, and the columns that papers print.

    datacomp38            Gadre et al., "DataComp", NeurIPS 2023, arXiv:2304.14108, in the layout of CLIP_benchmark
    clip_benchmark_vtab   Zhai et al., "A Large-scale Study of Representation Learning with the Visual Task Adaptation
                          Benchmark", 2019, arXiv:1910.04867: its 19 data sets as CLIP_benchmark has them, zero-shot
    retrieval             Flickr30k, COCO and Flickr8k
    sugarcrepe            Hsieh et al., NeurIPS 2023, arXiv:2306.14610
    winoground            Thrush et al., CVPR 2022, arXiv:2204.03162
    aro                   Yuksekgonul et al., ICLR 2023, arXiv:2210.01936

A data set counts with one number; a column is the mean over some data sets' numbers. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from amclr_scale.errors import UserError, did_you_mean


@dataclass(frozen=True)
class DataSet:
    """One data set of a suite.

    Attributes:
        name: as its benchmark calls it; one name is one data set in every suite.
        title: in tables.
        places: files or folders below --data, of which the first that exists is taken.
        kind: which reader opens it (open.py).
        number: what it counts with, of the numbers that are measured.
        words: that number in words.
        group: which column of a sample's .npy says its group, where groups are measured.
    """

    name: str
    title: str
    places: tuple[str, ...]
    kind: str = "classes"
    number: str = "zero_shot_top1"
    words: str = "top 1"
    group: int | None = None


@dataclass(frozen=True)
class Column:
    """The mean of numbers, each of one data set.

    Attributes:
        title: in tables.
        over: (data set, number).
    """

    title: str
    over: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Suite:
    """Data sets that are measured together.

    Attributes:
        columns: as the papers have them; the last one is the overall number.
    """

    name: str
    title: str
    sets: tuple[DataSet, ...]
    columns: tuple[Column, ...]

    def find(self, name: str) -> DataSet:
        """The data set of that name."""
        return next(one for one in self.sets if one.name == name)


def _folders(*names: str) -> tuple[str, ...]:
    """Where CLIP_benchmark and DataComp keep a data set: / in its name becomes - in the folder's."""
    flat = [name.replace("/", "-") for name in names]
    return tuple(dict.fromkeys(place for one in flat for place in (f"wds_{one}_test", f"wds_{one}", one)))


def _classes(name: str, title: str, number: str = "zero_shot_top1", *also: str) -> DataSet:
    words = {"zero_shot_top1": "top 1", "zero_shot_mean_per_class": "mean per class"}[number]
    return DataSet(name, title, _folders(name, *also), number=number, words=words)


def _grouped(name: str, title: str, number: str, words: str, group: int | None) -> DataSet:
    return DataSet(name, title, _folders(name, name.rpartition("/")[2]), "classes", number, words, group)


def _retrieval(name: str, title: str, *files: str) -> DataSet:
    within = "coco" if name.startswith("mscoco") else name
    files = tuple(place for file in files for place in (file, f"{within}/{file}"))
    return DataSet(name, title, (*_folders(name), *files), "retrieval", "mean_R@1", "mean R@1 of both directions")


_MEAN = "zero_shot_mean_per_class"
_TOP = "zero_shot_top1"
_FLICKR = _retrieval("flickr30k", "Flickr", "flickr30k_test.json", "dataset_flickr30k.json")
_COCO = _retrieval("mscoco_captions", "MSCOCO", "coco_karpathy_test.json", "coco_test.json", "dataset_coco.json")
_FLICKR8K = _retrieval("flickr8k", "Flickr8k", "dataset_flickr8k.json")

# Name, title, number of those that both DataComp and VTAB have, or one of them.
_VTAB = {
    "natural": {
        "vtab/caltech101": "Caltech-101",
        "vtab/cifar100": "CIFAR-100",
        "vtab/dtd": "Describable Textures",
        "vtab/flowers": "Oxford Flowers-102",
        "vtab/pets": "Oxford-IIIT Pet",
        "sun397": "SUN397",
        "vtab/svhn": "SVHN",
    },
    "specialized": {
        "vtab/diabetic_retinopathy": "Diabetic Retinopathy",
        "vtab/eurosat": "EuroSAT",
        "vtab/pcam": "PatchCamelyon",
        "vtab/resisc45": "RESISC45",
    },
    "structured": {
        "vtab/clevr_count_all": "CLEVR Counts",
        "vtab/clevr_closest_object_distance": "CLEVR Distance",
        "vtab/dmlab": "DMLab",
        "vtab/dsprites_label_orientation": "dSprites Orientation",
        "vtab/dsprites_label_x_position": "dSprites Location",
        "vtab/kitti_closest_vehicle_distance": "KITTI Vehicle Distance",
        "vtab/smallnorb_label_azimuth": "SmallNORB Azimuth",
        "vtab/smallnorb_label_elevation": "SmallNORB Elevation",
    },
}
_VTAB_TITLES = {name: title for group in _VTAB.values() for name, title in group.items()}
_NOT_IN_DATACOMP = {
    "vtab/diabetic_retinopathy", "vtab/dmlab", "vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position",
    "vtab/smallnorb_label_azimuth", "vtab/smallnorb_label_elevation",
}  # fmt: skip
_MEAN_PER_CLASS = {"vtab/caltech101", "vtab/flowers", "vtab/pets", "fgvc_aircraft"}
_SHIFTS = {
    "imagenet_sketch": "ImageNet Sketch",
    "imagenetv2": "ImageNet v2",
    "imagenet-a": "ImageNet-A",
    "imagenet-o": "ImageNet-O",
    "imagenet-r": "ImageNet-R",
    "objectnet": "ObjectNet",
}
_OTHERS = {
    "cifar10": "CIFAR-10",
    "country211": "Country211",
    "fgvc_aircraft": "FGVC Aircraft",
    "food101": "Food-101",
    "gtsrb": "GTSRB",
    "mnist": "MNIST",
    "voc2007": "Pascal VOC 2007",
    "renderedsst2": "Rendered SST2",
    "cars": "Stanford Cars",
    "stl10": "STL-10",
}
_ALSO = {"cifar10": ("vtab/cifar10",), "sun397": ("vtab/sun397",), "vtab/cifar100": ("cifar100",)}
_WINOGAVIL = DataSet(
    "winogavil", "WinoGAViL", ("winogavil/winogavil_dataset.csv", "winogavil/test.csv", "winogavil_dataset.csv"),
    "winogavil", "jaccard_10_12", "Jaccard, 10 and 12 candidates",
)  # fmt: skip
_WILDS = (
    _grouped("wilds/iwildcam", "iWildCam", "f1_macro", "macro F1", None),
    _grouped("wilds/camelyon17", "Camelyon17", _TOP, "top 1", None),
    _grouped("wilds/fmow", "FMoW", "worst_group_top1", "top 1 of the worst region", 0),
)
_FAIR = (
    _grouped("dollar_street", "Dollar Street", "worst_group_top5", "top 5 of the worst income group", 0),
    _grouped("geode", "GeoDE", "worst_group_top1", "top 1 of the worst region", 0),
)


def _number(name: str) -> str:
    return _MEAN if name in _MEAN_PER_CLASS else _TOP


def _column(title: str, sets: Sequence[DataSet]) -> Column:
    return Column(title, tuple((one.name, one.number) for one in sets))


def _datacomp() -> Suite:
    imagenet = _classes("imagenet1k", "ImageNet 1k")
    shifts = [_classes(*one) for one in _SHIFTS.items()]
    vtab = [
        _classes(name, title, _number(name), *_ALSO.get(name, ()))
        for name, title in _VTAB_TITLES.items()
        if name not in _NOT_IN_DATACOMP
    ]
    others = [_classes(name, title, _number(name), *_ALSO.get(name, ())) for name, title in _OTHERS.items()]
    retrieved = [_FLICKR, _COCO, _WINOGAVIL]
    sets = [imagenet, *shifts, *vtab, *others, *retrieved, *_WILDS, *_FAIR]
    columns = [
        _column("ImageNet", [imagenet]),
        _column("ImageNet shifts", shifts),
        _column("VTAB", vtab),
        _column("Retrieval", retrieved),
        _column("Average over 38", sets),
    ]
    return Suite("datacomp38", "DataComp's 38 data sets", tuple(sets), tuple(columns))


def _vtab() -> Suite:
    groups = {
        group: [_classes(name, title, _TOP, *_ALSO.get(name, ())) for name, title in names.items()]
        for group, names in _VTAB.items()
    }
    sets = [one for group in groups.values() for one in group]
    columns = [_column(group.capitalize(), found) for group, found in groups.items()]
    return Suite(
        "clip_benchmark_vtab", "VTAB's 19 data sets, zero-shot", tuple(sets), (*columns, _column("Mean over 19", sets))
    )


def _recalls() -> Suite:
    sets = (_FLICKR, _COCO, _FLICKR8K)
    columns = [
        Column(f"{one.title} {words} R@{k}", ((one.name, f"{direction}_R@{k}"),))
        for one in sets
        for direction, words in (("image_to_text", "TR"), ("text_to_image", "IR"))
        for k in (1, 5, 10)
    ]
    return Suite("retrieval", "Retrieval: TR image to text, IR text to image", sets, tuple(columns))


def _listed(*folders: str, file: str) -> tuple[str, ...]:
    return (*(f"{folder}/{file}" for folder in folders), file)


def _sugarcrepe() -> Suite:
    kinds = {"replace": ("obj", "att", "rel"), "swap": ("obj", "att"), "add": ("obj", "att")}
    said = {"obj": "object", "att": "attribute", "rel": "relation"}
    sets, columns = list[DataSet](), list[Column]()
    for way, parts in kinds.items():
        mine = [
            DataSet(
                f"{way}_{part}", f"{way.capitalize()} {said[part]}",
                _listed("sugarcrepe", "sugar_crepe", "sugar-crepe/data", file=f"{way}_{part}.json"),
                "sugarcrepe", "right", "right caption first",
            )
            for part in parts
        ]  # fmt: skip
        sets += mine
        columns += [*(_column(one.title, [one]) for one in mine), _column(f"{way.capitalize()} mean", mine)]
    return Suite("sugarcrepe", "SugarCrepe", tuple(sets), (*columns, _column("Mean over 7", sets)))


def _winoground() -> Suite:
    places = _listed("winoground/data", "winoground", "data", file="examples.jsonl")
    one = DataSet("winoground", "Winoground", places, "winoground", "group_score", "group score")
    columns = [Column(f"{way.capitalize()} score", ((one.name, f"{way}_score"),)) for way in ("text", "image", "group")]
    return Suite("winoground", "Winoground", (one,), tuple(columns))


def _aro() -> Suite:
    macro, first = ("macro_right", "right caption first, macro"), ("right", "right caption first")
    kinds = {
        "visual_genome_relation": ("VG-Relation", "aro_relation", *macro),
        "visual_genome_attribution": ("VG-Attribution", "aro_attribution", *macro),
        "coco_order": ("COCO-Order", "aro_order", *first),
        "flickr30k_order": ("Flickr30k-Order", "aro_order", *first),
    }
    sets = [
        DataSet(name, title, _listed("aro", file=f"{name}.json"), kind, number, words)
        for name, (title, kind, number, words) in kinds.items()
    ]
    return Suite("aro", "ARO", tuple(sets), tuple(_column(one.title, [one]) for one in sets))


SUITES = {one.name: one for one in (_datacomp(), _vtab(), _recalls(), _sugarcrepe(), _winoground(), _aro())}


def suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        UserError: there is none.
    """
    if name not in SUITES:
        raise UserError(
            f"--suite: with --data, expected one of {', '.join(SUITES)}, got {name}{did_you_mean(name, SUITES)}"
        )
    return SUITES[name]
