"""Stored sets in class folders: labelled by name, damaged images named."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from trainables.data.base import Data, Split
from trainables.data.images import as_rgb
from trainables.data.registry import StoredSet, folder_data_set
from trainables.data.stored import stored_split

SIDE = 16
CLASSES = ("n03", "n01", "n02")
NOTHING = Split(images=torch.empty(0), labels=torch.empty(0), ids=())


def write(path, value=0, size=(SIDE, SIDE), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path, **options)


def folder(root, *, complete=False, native=True, **options):
    data = Data(
        data_set=folder_data_set(image_size=SIDE, num_classes=3, train_images=9, content="0" * 8),
        train=NOTHING,
        held_out=NOTHING,
        class_names=CLASSES,
        **options,
    )
    stored = StoredSet(
        name="set", title="Set", layout="", evaluator="natural", complete=complete, native=native
    )
    return stored_split(stored, root, data)


def read(images):
    splits = list(images.parts(batch_size=2))
    labels = torch.cat([split.labels for split in splits]).tolist()
    return torch.cat([split.images for split in splits]), labels, [i for s in splits for i in s.ids]


def test_labels_follow_the_class_names_and_not_the_folder_order(tmp_path):
    for value, name in enumerate(("n01", "n02", "n03")):
        write(tmp_path / name / "a.png", 10 * value)
    images, labels, ids = read(folder(tmp_path))
    assert labels == [0, 1, 2]
    assert ids == ["n03/a", "n01/a", "n02/a"]
    assert images[:, 0, 0, 0].tolist() == [20, 0, 10]


def test_threads_read_a_folder_in_its_order(tmp_path, monkeypatch):
    for number in range(12):
        write(tmp_path / "n01" / f"{number:02d}.png", number)
    met = threading.Barrier(4, timeout=30)  # broken unless four read at once
    monkeypatch.setattr("trainables.data.images.as_rgb", lambda file: (met.wait(), as_rgb(file))[1])
    images = folder(tmp_path, workers=4)
    values = torch.cat([part.images[:][:, 0, 0, 0] for part in images.parts(batch_size=4)])
    assert values.tolist() == list(range(12))


def test_a_folder_that_is_no_class_is_named(tmp_path):
    write(tmp_path / "n01" / "a.png")
    write(tmp_path / "n99" / "a.png")
    with pytest.raises(ValueError, match="n99 is no class of the data: remove it"):
        folder(tmp_path)


def test_classes_that_lack_are_named_where_all_are_needed(tmp_path):
    write(tmp_path / "n01" / "a.png")
    assert folder(tmp_path).labels.tolist() == [1]
    with pytest.raises(ValueError, match=r"lacks 2 classes; first: \['n03', 'n02'\]"):
        folder(tmp_path, complete=True)


def test_an_empty_or_absent_root_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match="<class>/<image>"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="absent cannot be read: No such file"):
        folder(tmp_path / "absent")


def test_what_is_hidden_is_left_alone_and_a_loop_is_named(tmp_path):
    write(tmp_path / "n01" / "a.png")
    (tmp_path / "n01" / "._a.png").write_bytes(b"Mac OS X")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert folder(tmp_path).ids == ("n01/a",)
    assert read(folder(tmp_path))[2] == ["n01/a"]
    (tmp_path / "n02").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="n02 is a symbolic link loop: remove it"):
        folder(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_a_damaged_image_is_named(tmp_path, damage):
    write(tmp_path / "n01" / "a.jpg")
    path = tmp_path / "n01" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200] if damage == "truncated" else b"no image")
    with pytest.raises(ValueError, match=r"a\.jpg \(class n01\) cannot be read"):
        read(folder(tmp_path))


def test_a_wrong_size_is_named_unless_images_are_resized(tmp_path):
    write(tmp_path / "n01" / "a.png", 7, size=(40, 20))
    with pytest.raises(ValueError, match="40 x 20 px, not 16 x 16"):
        read(folder(tmp_path))
    images, _, _ = read(folder(tmp_path, native=False))
    assert images.shape == (1, 3, SIDE, SIDE)
    assert (images == 7).all()


def test_resizing_cuts_out_the_middle(tmp_path):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    path = tmp_path / "n01" / "a.png"
    write(path)
    Image.fromarray(pixels).save(path)
    image = read(folder(tmp_path, native=False))[0][0, 0]
    assert (image[:, :7] == 0).all()
    assert (image[:, 9:] == 255).all()


def test_the_camera_orientation_is_applied(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[274] = 3  # upside down
    path = tmp_path / "n01" / "a.png"
    write(path)
    Image.fromarray(pixels).save(path, exif=exif)
    image = read(folder(tmp_path))[0][0, 0]
    assert image[-1].tolist() == [255] * SIDE
    assert (image[:-1] == 0).all()
