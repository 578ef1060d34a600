"""Shards: samples of the images, of any sizes, and the store that holds those judged."""

from __future__ import annotations

import pyarrow as pa
import pytest

from evaluators.ledger import LEDGER, to_parquet
from evaluators.shards import GROWTH, ShardStore
from trainables.data.base import WHOLE, Shard

IDS = tuple(f"class-{k}/{i:03d}" for k in range(10) for i in range(100))


def table(shard):
    rows = [
        {"image_id": f"{place:03d}", "question": question}
        for question in ("late", "early")
        for place in range(shard.first, shard.end)
    ]
    return pa.Table.from_pylist(rows, schema=LEDGER)


def filled(folder, total, *bounds):
    store = ShardStore(folder, total)
    for first, end in bounds:
        store.add(Shard(first, end), to_parquet(table(Shard(first, end)), seconds=end - first))
    return store


def test_shards_part_the_images_and_each_is_a_sample_of_all_classes():
    parts = [Shard(0, 100).of(IDS), Shard(100, 730).of(IDS), Shard(730, 1000).of(IDS)]
    assert sorted(place for part in parts for place in part) == list(range(1000))
    assert all((part[1:] > part[:-1]).all() for part in parts)
    # Of 100 images out of ten classes of 100: ten of each, give or take three deviations.
    counts = [sum(place // 100 == k for place in parts[0]) for k in range(10)]
    assert all(1 <= count <= 19 for count in counts)
    assert WHOLE.of(IDS).tolist() == list(range(1000))
    assert Shard(5, 5).of(IDS).tolist() == []


def test_an_image_keeps_its_rank_where_the_list_has_another_order():
    backwards = IDS[::-1]
    assert {IDS[i] for i in Shard(3, 40).of(IDS)} == {
        backwards[i] for i in Shard(3, 40).of(backwards)
    }


def test_a_store_says_what_is_missing_between_shards_of_any_size(tmp_path):
    assert filled(tmp_path, 10).missing() == [Shard(0, 10)]
    store = filled(tmp_path, 10, (2, 3), (7, 9))
    for opened in (store, ShardStore(tmp_path, 10)):
        assert opened.missing() == [Shard(0, 2), Shard(3, 7), Shard(9, 10)]
        assert opened.judged == 3


def test_a_ledger_does_not_depend_on_how_it_was_cut(tmp_path):
    whole, seconds = filled(tmp_path / "whole", 10, (0, 10)).merged()
    parts, _ = filled(tmp_path / "parts", 10, (6, 10), (1, 6), (0, 1)).merged()
    assert (parts.equals(whole), seconds) == (True, 10)
    assert whole["question"].to_pylist() == ["late"] * 10 + ["early"] * 10
    assert whole["image_id"].to_pylist() == [f"{i:03d}" for i in range(10)] * 2


def test_shards_that_overlap_count_once(tmp_path):
    filled(tmp_path, 10, (0, 6), (4, 10), (6, 8))
    store = ShardStore(tmp_path, 10)
    assert store.missing() == [Shard(8, 10)]
    assert store.merged()[0].num_rows == 2 * 8


def test_a_damaged_shard_is_judged_again(tmp_path):
    filled(tmp_path, 10, (0, 5), (5, 10))
    (path,) = tmp_path.glob("5-10-*.parquet")
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)
    (tmp_path / "0-of-3-0123456789abcdef.parquet").write_bytes(b"of a former version")
    assert ShardStore(tmp_path, 10).missing() == [Shard(5, 10)]
    (path,) = tmp_path.iterdir()
    assert path.name[:4] == "0-5-"
    path.rename(tmp_path / "5-10-0123456789abcdef.parquet")
    assert ShardStore(tmp_path, 10).missing() == [Shard(0, 10)]
    assert not list(tmp_path.iterdir())


def paced(folder, seconds_of, *, side=16, least=1, shards=8):
    """Return the sizes of a cell's first shards where n images take `seconds_of(n)`."""
    store, sizes = ShardStore(folder, 10**9, side=side, least=least), []
    for _ in range(shards):
        shard = store.take()
        sizes.append(len(shard))
        store.add(shard, to_parquet(LEDGER.empty_table(), seconds=seconds_of(len(shard))))
    return sizes


@pytest.mark.parametrize(
    ("side", "least", "first"), [(16, 1, 64), (32, 1, 16), (224, 1, 1), (16, 10_000, 10_000)]
)
def test_a_cells_first_shard_is_small(tmp_path, side, least, first):
    assert len(ShardStore(tmp_path, 10**6, side=side, least=least).take()) == first


def test_shards_grow_fourfold_until_they_take_thirty_seconds(tmp_path):
    assert paced(tmp_path, lambda n: 0.01 * n) == [64, 256, 1024, *[3000] * 5]
    assert GROWTH == 4


def test_an_image_that_takes_longer_than_thirty_seconds_is_a_shard(tmp_path):
    assert paced(tmp_path, lambda n: 100.0 * n, side=224) == [1, 2, *[1] * 6]


def test_shards_of_latency_alone_grow_for_all_that(tmp_path):
    sizes = paced(tmp_path, lambda n: 45 + 0.25 * n, side=224)
    assert sizes[:4] == [1, 2, 7, 17]
    assert sizes[-1] == pytest.approx(120, rel=0.15)


@pytest.mark.parametrize(("images", "taken"), [(96, 96), (97, 64)])
def test_a_small_rest_is_no_shard_of_its_own(tmp_path, images, taken):
    assert ShardStore(tmp_path, images, side=16).take() == Shard(0, taken)


def test_shards_are_multiples_of_the_least_up_to_the_last(tmp_path):
    store, taken = ShardStore(tmp_path, 250, side=16, least=24), []
    while store.waiting:
        taken.append(store.take())
    # 64 images at 16 px come down to 48; the 58 that are left after four shards are one.
    assert [(shard.first, shard.end) for shard in taken] == [
        *((0, 48), (48, 96), (96, 144), (144, 192)),
        (192, 250),
    ]
