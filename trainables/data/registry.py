"""The registry of data sets: one entry says all that the other rooms ask of a data set.

Nothing here imports torch or opens a file, so that `--plan` stays quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trainables.recipe import Interpolation, Preprocessing, unknown

REDUCED = "-reduced"  # ends the name of a scale whose models are cut down
FOLDER = "folder"  # the name of a user's own folders, which say themselves what they hold
SMALLEST_SIZE, LARGEST_SIZE, SIZE_STEP = 16, 1024, 4  # of images for the study's models
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEVERITIES = (1, 2, 3, 4, 5)  # of every corruption
CORRUPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
KINDS = tuple(kind for group in CORRUPTION_GROUPS.values() for kind in group)
EXTRA_KINDS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # not of the fifteen

# The categories of the cue-conflict stimuli: their places among ImageNet's classes, in the order of
# their WordNet ids. Source: rgeirhos/texture-vs-shape, code/helper/human_categories.py; equal to
# those of bethgelab/model-vs-human, modelvshuman/helper/human_categories.py.
SIXTEEN_CLASSES = {
    "airplane": "404",
    "bear": "294-297",
    "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145",
    "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907",
    "car": "436 511 817",
    "cat": "281-286",
    "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386",
    "keyboard": "508 878",
    "knife": "499",
    "oven": "766",
    "truck": "555 569 656 675 717 734 864 867",
}


@dataclass(frozen=True)
class StoredSet:
    """A published out-of-distribution set, and the evaluator that reads it.

    It lies where `--stored NAME=DIR` says, or in the folder of its name below the data.
    `images`: as published, of each kind and severity where it has kinds. `folder`: where its class
    folders lie below its root. `classes`: timm's list of its classes, none: the data's own; names
    are classes of its own, and its labels number them. `complete`: every class has a folder.
    `native`: stored at the data's size, or at `size`. `arrays`: the .npy files of its images and
    labels; of a set with kinds, the labels alone. `alone`: nothing stands in for it.
    """

    name: str
    title: str
    evaluator: str
    images: int = 0
    folder: str = ""
    classes: tuple[str, ...] | str = ""
    complete: bool = True
    native: bool = True
    size: int = 0
    arrays: tuple[str, ...] = ()
    alone: bool = False


_STORED = (
    StoredSet(
        *("imagenet-a", "ImageNet-A", "natural", 7_500),
        classes="imagenet_a_synsets.txt",
        complete=False,
        native=False,
    ),
    StoredSet(
        *("imagenet-r", "ImageNet-R", "imagenet-r", 30_000),
        classes="imagenet_r_synsets.txt",
        complete=False,
        native=False,
        alone=True,
    ),
    StoredSet(
        *("imagenet-sketch", "ImageNet-Sketch", "imagenet-sketch", 50_889),
        classes="imagenet_synsets.txt",
        native=False,
        alone=True,
    ),
    StoredSet(  # matched-frequency, whose folders are named by the places of their classes
        *("imagenet-v2", "ImageNet-V2", "imagenet-v2", 10_000),
        classes="imagenet_synsets.txt",
        native=False,
        alone=True,
    ),
    StoredSet("imagenet-c", "ImageNet-C", "corruptions", images=50_000),  # below <kind>/<severity>
    StoredSet("imagenet-stylized", "Stylized-ImageNet", "stylized", images=50_000, folder="val"),
    StoredSet(  # the folder stimuli/style-transfer-preprocessed-512 of rgeirhos/texture-vs-shape
        *("cue-conflict", "the cue-conflict stimuli of texture-vs-shape", "cue-conflict", 1_280),
        classes=tuple(SIXTEEN_CLASSES),
        size=224,
    ),
    StoredSet("textures", "a texture dictionary", "tpa"),  # in the layout of PatchAttack
    StoredSet("cifar10-c", "CIFAR-10-C", "corruptions", images=10_000, arrays=("labels.npy",)),
    StoredSet(
        *("cifar10.1", "CIFAR-10.1", "natural", 2_000),
        arrays=("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy"),
    ),
)
STORED_SETS = {stored.name: stored for stored in _STORED}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a data set is, where its images come from and what stands beside it.

    Images lie in class folders below train/ and val/, unless a Python package holds them
    (`package`: "module:function", which takes the entry and returns both splits and the class
    names) or torchvision's archive does (`archive`: its class there). `classes`: the names in
    order, or timm's list of them; empty: the folders' sorted names. `exact_size`: images are stored
    at `image_size` and kept as one tensor. `flip`: a mirrored image is one of its class.
    `counterparts`: the stored sets that its evaluators read; without one a counterpart is
    generated. Not `generated`: the data and its stored sets must be as published, and published
    figures and AlexNet's errors, which mCE needs, are theirs. `origin`: the
    entry of which a model's preprocessing made this one. `chosen_train`: train by so many of the
    images, 0: by all.
    """

    name: str
    title: str
    image_size: int
    num_classes: int
    train_images: int
    held_out_images: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float | None = None
    squash: bool = False
    interpolation: Interpolation = "bilinear"
    classes: tuple[str, ...] | str = ()
    package: str = ""
    archive: str = ""
    exact_size: bool = False
    flip: bool = True
    counterparts: tuple[str, ...] = tuple(stored.name for stored in _STORED if not stored.arrays)
    generated: bool = True
    origin: DataSet | None = None
    chosen_train: int = 0

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(
                f"a classifier needs at least two classes, and {self.title} has {self.num_classes}"
            )

    @property
    def short_title(self) -> str:
        return self.title.partition(",")[0]

    @property
    def preprocessing(self) -> Preprocessing:
        names = ("crop", "squash", "interpolation", "mean", "std")
        return Preprocessing(size=self.image_size, **{name: getattr(self, name) for name in names})

    def preprocessed(self, preprocessing: Preprocessing) -> DataSet:
        """Return the data set as a model with a preprocessing of its own sees it."""
        changes = preprocessing.beyond(self.preprocessing).chosen()
        if "size" in changes:
            changes["image_size"] = changes.pop("size")
        return replace(self, origin=self.origin or self, **changes) if changes else self

    @property
    def in_memory(self) -> bool:
        """Whether its images are stored at one size, and kept so: none is cut."""
        return bool(self.package) or self.exact_size

    @property
    def departure(self) -> Preprocessing:
        """What a model's preprocessing has otherwise than the entry."""
        return self.preprocessing.beyond((self.origin or self).preprocessing)

    @property
    def stored_size(self) -> int:
        """The side at which images of an exact size, and stored sets, are stored."""
        return (self.origin or self).image_size

    def stand_in(self, kind: str) -> str:
        """Return the title of a generated counterpart of a kind."""
        return f"{kind} ({self.name}{'' if self.generated else ', generated'})"

    def counterpart(self, evaluator: str) -> str:
        """Return the name of the stored set that an evaluator reads, '' where there is none."""
        names = (name for name in self.counterparts if STORED_SETS[name].evaluator == evaluator)
        return next(names, "")


_KNOWN = (
    DataSet(
        name="digits",
        title="scikit-learn's handwritten digits, 16 px (1,200 to train, 597 held out)",
        image_size=16,
        num_classes=10,
        train_images=1_200,
        held_out_images=597,
        mean=(0.3, 0.3, 0.3),
        std=(0.35, 0.35, 0.35),
        package="trainables.data.load:digits",
        flip=False,
        counterparts=(),
    ),
    DataSet(
        name="imagenet",
        title="ImageNet, 224 px",
        image_size=224,
        num_classes=1000,
        train_images=1_281_167,
        held_out_images=50_000,
        classes="imagenet_synsets.txt",
        generated=False,
    ),
    DataSet(
        name="cifar10",
        title="CIFAR-10, 32 px",
        image_size=32,
        num_classes=10,
        train_images=50_000,
        held_out_images=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        classes=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
        archive="CIFAR10",
        exact_size=True,
        counterparts=("cifar10.1", "cifar10-c", "imagenet-stylized", "textures"),
    ),
)
DATA_SETS = {data_set.name: data_set for data_set in _KNOWN}


def is_buildable(size: int) -> bool:
    """Tell whether the study's models can be built for images of a size."""
    return SMALLEST_SIZE <= size <= LARGEST_SIZE and size % SIZE_STEP == 0


def check_size(size: int) -> None:
    """Raise ValueError where the study's models cannot be built for images of a size."""
    if not is_buildable(size):
        allowed = f"a multiple of {SIZE_STEP} from {SMALLEST_SIZE} to {LARGEST_SIZE}"
        raise ValueError(f"an image size of {size} is not {allowed}")


def register(data_set: DataSet) -> None:
    """Add an entry; ValueError where its name is taken, or a stored set of its is not known."""
    check_size(data_set.image_size)
    if data_set.name in (*DATA_SETS, FOLDER):
        raise ValueError(f"data set {data_set.name!r} is there already")
    for stored in data_set.counterparts:
        if stored not in STORED_SETS:
            raise ValueError(unknown("stored set", stored, STORED_SETS))
    DATA_SETS[data_set.name] = data_set


def data_set_named(name: str) -> DataSet:
    """Return an entry, a folder's from what its name says; ValueError lists the names.

    The name of a part of another's train images ends in their number, as in digits-300train.
    """
    if name in DATA_SETS:
        return DATA_SETS[name]
    if name.endswith(REDUCED):
        whole = data_set_named(name.removesuffix(REDUCED))
        return replace(whole, name=name, title=f"{whole.title}, models reduced")
    if part := re.fullmatch(r"(.+)-(\d+)train", name):
        whole, images = data_set_named(part[1]), int(part[2])
        title = f"{whole.title}, trained by {images:,}"
        return replace(whole, name=name, title=title, train_images=images, chosen_train=images)
    numbers = re.fullmatch(r"folder-(\d+)px-(\d+)classes-(\d+)train-([0-9a-f]{8})", name)
    if not numbers:
        raise ValueError(unknown("scale", name, (*DATA_SETS, FOLDER)))
    size, classes, images = map(int, numbers.groups()[:3])
    return folder_data_set(
        image_size=size, num_classes=classes, train_images=images, content=numbers[4]
    )


def folder_data_set(
    *, image_size: int, num_classes: int, train_images: int, content: str
) -> DataSet:
    """Return the entry of a user's folders; `content` are 8 hex digits of what lies in them."""
    check_size(image_size)
    return DataSet(
        name=f"folder-{image_size}px-{num_classes}classes-{train_images}train-{content}",
        title=f"a folder of {num_classes} classes, {image_size} px ({train_images:,} to train)",
        image_size=image_size,
        num_classes=num_classes,
        train_images=train_images,
    )
