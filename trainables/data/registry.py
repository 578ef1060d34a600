"""The registry of data sets: one entry says all that the other rooms ask of a data set.

Nothing here imports torch or opens a file, so that `--plan` stays quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainables.recipe import Interpolation, Preprocessing, unknown

REDUCED = "-reduced"  # ends the name of a scale whose models are cut down
FOLDER = "folder"  # the name of a user's own folders, which say themselves what they hold
SMALLEST_SIZE, LARGEST_SIZE, SIZE_STEP = 16, 1024, 4  # of images for the study's models
IMAGENET_CLASSES = 1000
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


# ObjectNet's folders that are classes of ImageNet. Sources: mapping_files of abarbu/objectnet-
# template-pytorch @50cc886 (the places), objectnet_metadata of mlfoundations/wise-ft (the folders).
_OBJECTNET = """
alarm_clock 409 530, backpack 414, banana 954, band_aid 419, basket 790, beer_bottle 440, bench
703, bicycle 444 671, binder_closed 446, bottle_cap 455, bread_loaf 930, broom 462, bucket 463,
butchers_knife 499, can_opener 473, candle 470, cellphone 487, chair 423 559 765, clothes_hamper
588, coffee_french_press 550, combination_lock 507, computer_mouse 673, desk_lamp 846, doormat
539, dress 578, dress_shoe_men 630, drill 740, drinking_cup 968, drying_rack_for_dishes 729,
envelope 549, fan 545, frying_pan 567, full_sized_towel 434, hair_dryer 589, hammer 587,
hand_towel_or_rag 533, helmet 518 560, iron_for_clothes 606, jeans 608, keyboard 508, ladle 618,
lampshade 619, laptop_open 620, lemon 951, letter_opener 623, lighter 626, lipstick 629, match
644, measuring_cup 647, microwave 651, mixing_salad_bowl 659, monitor 664, mug 504, nail_fastener
677, necklace 679, orange 950, padlock 695, paintbrush 696, paper_towel 700, pen 418 563 749,
pill_bottle 720, pillow 721, pitcher 725, plastic_bag 728, plate 923, plunger 731, pop_can 737,
portable_heater 811, printer 742, remote_control 761, ruler 769, running_shoe 770, safety_pin 772,
salt_shaker 773, sandal 774, screw 783, shovel 792, skirt 601 655 689, sleeping_bag 797,
soap_dispenser 804, sock 806, soup_bowl 809, spatula 813, speaker 632, still_camera 732 759,
strainer 828, stuffed_animal 850, suit_jacket 834, sunglasses 837, sweater 841, swimming_trunks
842, t-shirt 610, teapot 849, tennis_racket 752, tie 457 906, toaster 859, toilet_paper_roll 999,
trash_bin 412, tray 868, tv 851, umbrella 879, vacuum_cleaner 882, vase 883, wallet 893, watch
531, water_bottle 898, weight_exercise 543, weight_scale 778, wheel 479 694, whistle 902,
wine_bottle 907, winter_glove 658, wok 909
"""
OBJECTNET_CLASSES: dict[str, str] = dict(
    " ".join(entry.split()).split(" ", 1) for entry in _OBJECTNET.split(",")
)
# The same 113 groups, of which ImageNet-D names twelve otherwise. Source: preprocessing/
# imgnet_d2imgnet_id.txt of chenshuang-zhang/imagenet_d @d8bb2df.
_RENAMED = {
    **{"full_sized_towel": "bath_towel", "butchers_knife": "cleaver", "dress": "gown"},
    **{"coffee_french_press": "coffee_or_french_press", "hand_towel_or_rag": "dishcloth"},
    **{"drying_rack_for_dishes": "drying_rack_for_plates", "match": "matchstick"},
    **{"mixing_salad_bowl": "mixing_or_salad_bowl", "basket": "shopping_basket"},
    **{"t-shirt": "t_shirt", "drinking_cup": "tea_cup", "stuffed_animal": "teddy_bear"},
}
IMAGENET_D_CLASSES = {_RENAMED.get(n, n): places for n, places in OBJECTNET_CLASSES.items()}
# Source: laionc/mappings/category_mapping.json of FanfeiLi/LAION-C @3c6cad5.
LAION_C_CLASSES = {
    **{name: SIXTEEN_CLASSES[name] for name in ("bird", "bottle", "cat", "dog")},
    **{"ball": "429-430 768 805 852 890", "boat": "472 510 554 576 625 814 914"},
    **{"butterfly": "321-326", "car_truck": "436 511 555 569 656 675 717 734 817 864 867"},
    **{"chair": "423 559 703 765 831 857", "fish": "0-4 147-148 393-397"},
    **{"fruit": "948-951 953-954", "primate": "365-382", "snakes": "52-55 57-68"},
    **{"instruments": "401-402 420 432 546 558 566 579 593-594 776 881 889"},
    **{"timekeeping": "409 530-531 826 835 892", "tools": "491 499 587 596 740 784 792"},
}


def places_of(ranges: str) -> list[int]:
    """Return ImageNet's places of a class: 8 and 10 to 12 of '8 10-12'."""
    parts = (part.partition("-") for part in ranges.split())
    return [p for first, _, last in parts for p in range(int(first), int(last or first) + 1)]


@dataclass(frozen=True)
class StoredSet:
    """A published set of test images, and the evaluator that reads it.

    It lies where `--stored NAME=DIR` says, or in the folder of its name below the data.
    `images`: as published, of each kind and severity where it has kinds; 0: not stated.
    `folder`: where its class folders lie below its root. `classes`: timm's list of its classes,
    none: the data's own; names are classes of its own, and its labels number them. `complete`:
    every class has a folder. `others`: further folders are passed over.
    `native`: stored at the data's size, or at `size`. `squash`: both sides are resized. `border`:
    pixels that are cut off on each side. `arrays`: the .npy files of its images and labels; of a
    set with kinds, the labels alone. `alone`: nothing stands in for it.
    `kinds`: of corruptions, and `extra` ones that may lack; in the folder of each those of its
    severities, named by `severity`. `parts`: folders that each hold some of the class folders.
    `groups`: each class's places among ImageNet's 1,000, "8 10-12". The answer is the class of the
    likeliest place, or, `averaged`, the one whose places are likeliest in the mean. `labels`: its
    file of the places that each of ImageNet's held-out images, by number, has; all are right.
    `foreign`: its images are of no known class, whatever their folders' names.
    `source`: where its layout and protocol were read; `licence`: of its images or labels there.
    """

    name: str
    title: str
    evaluator: str
    images: int = 0
    folder: str = ""
    classes: tuple[str, ...] | str = ""
    complete: bool = True
    others: bool = False
    native: bool = True
    size: int = 0
    squash: bool = False
    border: int = 0
    arrays: tuple[str, ...] = ()
    alone: bool = False
    kinds: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    severity: str = "{}"
    parts: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict, hash=False)
    averaged: bool = False
    labels: str = ""
    foreign: bool = False
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        """Raise ValueError where the label map has a hole or a double."""
        if self.groups:
            object.__setattr__(self, "classes", tuple(self.groups))
        owners: dict[int, str] = {}
        for name, ranges in self.groups.items():
            if not (places := places_of(ranges)) or max(places) >= IMAGENET_CLASSES:
                wanted = f"give it some from 0 to {IMAGENET_CLASSES - 1}, such as '409 530-531'"
                raise ValueError(
                    f"{self.title}: class {name!r} has the places {ranges!r}; {wanted}"
                )
            for place in places:
                if (owner := owners.setdefault(place, name)) != name:
                    text = f"place {place} is of {owner!r} and of {name!r}: leave it to one"
                    raise ValueError(f"{self.title}: {text}")


_OF_IMAGENET = (
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
    StoredSet(  # among all 1,000 classes; its authors cut the red border off before they resize
        *("objectnet", "ObjectNet", "objectnet"),
        folder="images",
        groups=OBJECTNET_CLASSES,
        others=True,
        native=False,
        border=2,
        alone=True,
        source="abarbu/objectnet-template-pytorch @50cc886, objectnet_eval.py",
    ),
    StoredSet(  # among all 1,000 classes
        *("imagenet-d", "ImageNet-D", "imagenet-d"),
        groups=IMAGENET_D_CLASSES,
        complete=False,
        native=False,
        alone=True,
        parts=("background", "texture", "material"),
        source="chenshuang-zhang/imagenet_d @d8bb2df, evaluate_imagenet_models.py",
        licence="MIT",
    ),
    StoredSet(
        *("laion-c", "LAION-C", "laion-c"),
        groups=LAION_C_CLASSES,
        averaged=True,
        native=False,
        squash=True,
        alone=True,
        kinds=(
            *("glitched", "mosaic", "stickers", "vertical_lines"),
            *("geometric_shapes", "luminance_checkerboard"),
        ),
        severity="intensity_level_{}",
        source="FanfeiLi/LAION-C @3c6cad5, laionc/evaluation.py",
        licence="MIT",
    ),
    StoredSet(
        *("imagenet-c", "ImageNet-C", "corruptions", 50_000),
        kinds=KINDS,
        extra=EXTRA_KINDS,
        source="hendrycks/robustness @8190fe3, ImageNet-C/create_c/make_imagenet_c.py",
        licence="Apache-2.0",
    ),
    StoredSet(
        *("imagenet-c-bar", "ImageNet-C-bar", "imagenet-c-bar", 50_000),
        alone=True,
        kinds=(
            *("blue_noise_sample", "brownish_noise", "caustic_refraction", "checkerboard_cutout"),
            *("cocentric_sine_waves", "inverse_sparkles", "perlin_noise", "plasma_noise"),
            *("single_frequency_greyscale", "sparkles"),
        ),
        source="facebookresearch/augmentation-corruption @ba4d5a5, README.md",
        licence="MIT",
    ),
    StoredSet(
        *("imagenet-3dcc", "ImageNet-3DCC", "imagenet-3dcc", 50_000),
        alone=True,
        kinds=(
            *("near_focus", "far_focus", "bit_error", "color_quant", "flash", "fog_3d"),
            *("h265_abr", "h265_crf", "iso_noise", "low_light", "xy_motion_blur", "z_motion_blur"),
        ),
        source="shift-happens-benchmark/icml-2022 @0afdbbc, imagenet_3dcc.py",
        licence="CC-BY-NC-4.0",
    ),
    StoredSet("imagenet-stylized", "Stylized-ImageNet", "stylized", images=50_000, folder="val"),
    StoredSet(  # the folder stimuli/style-transfer-preprocessed-512 of rgeirhos/texture-vs-shape
        *("cue-conflict", "the cue-conflict stimuli of texture-vs-shape", "cue-conflict", 1_280),
        groups=SIXTEEN_CLASSES,
        averaged=True,
        size=224,
    ),
    StoredSet(
        *("imagenet-real", "ImageNet ReaL", "imagenet-real", 46_837),
        alone=True,
        labels="real.json",
        source="google-research/reassessed-imagenet @bcd006f, README.md",
        licence="Apache-2.0",
    ),
    StoredSet(  # any images of no class of the data: ImageNet-O, iNaturalist, SUN, Places
        *("ood", "images out of distribution", "ood"),
        native=False,
        alone=True,
        foreign=True,
    ),
    StoredSet("textures", "a texture dictionary", "tpa"),  # in the layout of PatchAttack
)
_OF_OTHERS = (
    StoredSet(
        *("cifar10-c", "CIFAR-10-C", "corruptions", 10_000),
        arrays=("labels.npy",),
        kinds=KINDS,
        extra=EXTRA_KINDS,
        source="hendrycks/robustness @8190fe3, ImageNet-C/create_c/make_cifar_c.py",
    ),
    StoredSet(
        *("cifar10.1", "CIFAR-10.1", "natural", 2_000),
        arrays=("cifar10.1_v6_data.npy", "cifar10.1_v6_labels.npy"),
        source="modestyachts/CIFAR-10.1 @d9982ab, README.md",
        licence="MIT",
    ),
    StoredSet(  # of an entry of one's own: Tiny ImageNet's class folders
        *("tiny-imagenet-c", "Tiny-ImageNet-C", "corruptions"),
        size=64,
        kinds=KINDS,
        extra=EXTRA_KINDS,
        source="hendrycks/robustness @8190fe3, ImageNet-C/create_c/make_tinyimagenet_c.py",
    ),
)
STORED_SETS = {stored.name: stored for stored in (*_OF_IMAGENET, *_OF_OTHERS)}


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
    counterparts: tuple[str, ...] = tuple(stored.name for stored in _OF_IMAGENET)
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
