"""Pages, page tables and their sizes against a model that keeps lists of pages."""

import numpy as np
import pytest

from fairkv_jax.engine.kv_cache_manager import KVCacheManager
from fairkv_jax.engine.page_pool import PagePool
from fairkv_jax.engine.page_tables import PageTables
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.plan import Profile, make_plan
from fairkv_jax.sharding.slots import SlotLayout

LAYERS, ROWS, DEVICES, SLOTS, PAGE = 2, 3, 2, 2, 8


def make_spec(pages_per_device: int = 200, num_rows: int = ROWS, sharing: int = 1) -> KVCacheSpec:
    return KVCacheSpec(
        num_layers=LAYERS,
        num_rows=num_rows,
        num_devices=DEVICES,
        slots_per_device=SLOTS,
        head_dim=16,
        page_size=PAGE,
        pages_per_device=pages_per_device,
        max_tokens=64,
        sharing=sharing,
    )


def make_layout() -> SlotLayout:
    """Three heads on two devices; head 0 has two replicas in layer 0, head 2 in layer 1."""
    profile = Profile("", "ada_snapkv", 50, ((90.0, 30.0, 20.0), (10.0, 25.0, 80.0)))
    return SlotLayout.from_plan(make_plan(profile, DEVICES, max_extra_replicas=1))


def make_manager(pages_per_device: int = 200) -> KVCacheManager:
    return KVCacheManager(make_spec(pages_per_device), make_layout())


def occupy(
    manager: KVCacheManager, row: int, lengths: np.ndarray, num_known_tokens: int = 0
) -> np.ndarray | None:
    """Reserves an empty row for a prompt and lets it decode."""
    reserved = manager.reserve_prompt(row, lengths, num_known_tokens)
    if reserved is not None:
        manager.activate(row)
    return reserved


@pytest.mark.parametrize("seed", range(6))
def test_segments_move_and_lose_nothing(seed: int):
    """Pairs grow, end and begin again until the list has been compacted many times."""
    rng = np.random.default_rng(seed)
    spec = make_spec(pages_per_device=400)
    tables = PageTables(spec)
    mirror = np.full(DEVICES * spec.table_entries, -1)
    starts = np.zeros_like(tables.starts)
    held: dict[int, list[int]] = {}
    num_pairs, compactions, before = tables.starts.size, 0, np.zeros(DEVICES)
    for turn in range(600):
        if rng.random() < 0.3 and held:
            pairs = rng.choice(sorted(held), min(3, len(held)), replace=False)
            tables.clear(pairs)
            for pair in pairs:
                del held[int(pair)]
        pairs = rng.choice(num_pairs, 4, replace=False)
        counts = rng.integers(1, 40, 4)
        devices = pairs % (DEVICES * SLOTS) // SLOTS
        used = [
            sum(len(pages) for pair, pages in held.items() if pair % 4 // SLOTS == device)
            for device in range(DEVICES)
        ]
        fits = [used[d] + counts[devices == d].sum() <= spec.pages_per_device for d in range(2)]
        if all(fits):
            pages = rng.integers(0, 400, counts.sum())
            tables.append(pairs, counts, pages)
            for pair, part in zip(pairs, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
                held.setdefault(int(pair), []).extend(part.tolist())
        compactions += int((tables._end < before).sum())
        before = tables._end.copy()
        if turn % 3 == 0:
            update = tables.take_update()
            assert len(np.unique(update.entry_index)) == update.num_entries
            mirror[update.entry_index] = update.entry_value
            starts.flat[update.start_index] = update.start_value
            for pair, pages in held.items():
                device = pair % (DEVICES * SLOTS) // SLOTS
                at = device * spec.table_entries + starts.flat[pair]
                assert mirror[at : at + len(pages)].tolist() == pages
                np.testing.assert_array_equal(tables.pages(np.array([pair]))[1], pages)
    assert compactions > 3


def test_segments_are_used_again():
    """The same row comes and goes more often than its segments fit into the list."""
    spec = make_spec(pages_per_device=60)
    tables, pairs = PageTables(spec), np.arange(SLOTS)
    ends = set()
    for _ in range(spec.table_entries):
        tables.append(pairs, np.array([9, 20]), np.arange(29))
        assert tables.take_update().num_entries == 29
        ends.add(int(tables._end[0]))
        tables.clear(pairs)
    assert len(ends) == 1


def test_segments_that_grow_move_seldom():
    tables, moved = PageTables(make_spec()), 0
    pair, one = np.array([0]), np.array([1])
    for _ in range(160):
        tables.append(pair, one, one)
        moved += len(tables.take_update().start_index)
    assert moved <= 14  # by a quarter each time


def test_a_compacted_list_is_sent_as_a_whole():
    tables = PageTables(make_spec(pages_per_device=400))
    tables.append(np.array([1]), np.array([3]), np.array([7, 8, 9]))
    for page in range(397):
        tables.take_update()
        tables.append(np.array([0]), np.array([1]), np.array([page]))
        if tables._compacted:
            break
    assert tables._compacted == {0}
    update = tables.take_update()
    assert update.entry_index.tolist() == list(range(int(tables._end[0])))
    start = int(update.start_value[update.start_index == 1][0])
    assert update.entry_value[start : start + 3].tolist() == [7, 8, 9]


def test_an_update_holds_only_what_has_changed():
    manager = make_manager()
    occupy(manager, 0, np.full((LAYERS, 3), 20))
    assert manager.take_page_table_update().num_entries == 2 * 3 * 3  # 20 tokens are 3 pages
    assert not manager.take_page_table_update()
    manager.reserve(4)
    assert not manager.take_page_table_update()
    manager.reserve(1)
    update = manager.take_page_table_update()
    assert update.num_entries == 2 * 3
    assert not len(update.start_index)


def test_a_page_opens_at_each_boundary_and_nowhere_else():
    manager = make_manager()
    occupy(manager, 0, np.full((LAYERS, 3), PAGE - 1))
    opened = []
    for _ in range(2 * PAGE + 2):
        before = manager.used_pages.sum()
        assert manager.reserve(1)
        opened.append(int(manager.used_pages.sum() - before))
    assert np.flatnonzero(opened).tolist() == [1, PAGE + 1, 2 * PAGE + 1]
    assert set(opened) == {0, 6}


def test_rows_get_all_pages_or_none():
    manager = make_manager(pages_per_device=13)
    assert occupy(manager, 0, np.full((LAYERS, 3), PAGE)) is not None
    used = manager.used_pages
    assert used.sum() == 6
    assert occupy(manager, 1, np.full((LAYERS, 3), 5 * PAGE)) is None
    np.testing.assert_array_equal(manager.used_pages, used)
    assert manager.can_reserve(1)
    assert manager.reserve(PAGE)
    assert manager.reserve(PAGE)
    before = manager.lengths.copy()
    while manager.reserve(PAGE):
        before = manager.lengths.copy()
    assert not manager.can_reserve(PAGE)
    np.testing.assert_array_equal(manager.lengths, before)


def test_a_prompt_needs_room_for_its_known_tokens_too():
    """A preempted row that just fits, but not with what it had generated, waits."""
    lengths = np.full((LAYERS, 3), PAGE)
    manager = make_manager(pages_per_device=8)
    assert occupy(manager, 0, lengths, 3 * PAGE) is None
    assert occupy(manager, 0, lengths, PAGE - 1) is not None


def test_heads_go_to_the_replica_on_the_emptier_device():
    layout, manager = make_layout(), make_manager()
    replicated = np.argwhere(layout.replicas.sum(2) == 2)
    assert len(replicated)
    served = set()
    for row in range(ROWS):
        lengths = occupy(manager, row, np.array([[40, 10, 10], [10, 10, 40]]))
        assert lengths is not None
        for layer, head in replicated:
            slots = np.flatnonzero(layout.head_of_slot[layer] == head)
            owned = [int(slot) for slot in slots if lengths[layer, slot]]
            assert len(owned) == 1
            served.add((int(layer), owned[0]))
    assert len(served) == 2 * len(replicated)


def test_a_suffix_goes_behind_the_tokens_of_its_row():
    """To the slots that own the row, whether the tokens fill a page, open several, or are none."""
    layout, manager = make_layout(), make_manager()
    for row in range(2):
        occupy(manager, row, np.array([[40, PAGE, 11], [10, 10, 40]]))
    before = manager.lengths
    pairs = np.argwhere(before > 0)
    pages = {tuple(pair): manager.pages_of(*pair).tolist() for pair in pairs}
    suffix = np.array([[3 * PAGE + 1, PAGE, 5], [0, 6, 7]])
    lengths = manager.reserve_suffix(1, suffix)
    assert lengths is not None
    np.testing.assert_array_equal(manager.lengths[:, 1], lengths)
    np.testing.assert_array_equal(manager.lengths[:, 0], before[:, 0])
    for layer, slot in np.argwhere(before[:, 1] > 0):
        head = layout.head_of_slot[layer, slot]
        assert lengths[layer, slot] == before[layer, 1, slot] + suffix[layer, head]
    np.testing.assert_array_equal(lengths > 0, before[:, 1] > 0)
    used = 0
    for pair, old in pages.items():
        now = manager.pages_of(*pair).tolist()
        assert now[: len(old)] == old
        assert len(now) == -(-manager.lengths[pair] // PAGE)
        used += len(now)
    assert manager.used_pages.sum() == used
    assert manager.reserve(1)
    np.testing.assert_array_equal(manager.lengths[:, 1], lengths + (lengths > 0))


def test_a_suffix_gets_all_pages_or_none():
    """Those that get them leave a page for one more token in every row."""
    manager = make_manager(pages_per_device=25)
    page_more = np.full((LAYERS, 3), PAGE)
    occupy(manager, 1, page_more)
    fullest = manager.used_pages.max()  # pages of one token more in every slot, too
    assert manager.reserve_prompt(0, page_more) is not None
    while manager.reserve_suffix(0, page_more) is not None:
        pass
    assert fullest <= 25 - manager.used_pages.max() < 3 * fullest
    lengths, used = manager.lengths, manager.used_pages
    assert used.max() > fullest
    manager.take_page_table_update()
    assert manager.reserve_suffix(0, page_more) is None
    np.testing.assert_array_equal(manager.lengths, lengths)
    np.testing.assert_array_equal(manager.used_pages, used)
    assert not manager.take_page_table_update()
    assert manager.reserve_suffix(0, np.full((LAYERS, 3), 0)) is not None
    manager.activate(0)
    assert manager.can_reserve(1)


def test_tokens_count_when_they_are_committed():
    manager = make_manager()
    occupy(manager, 1, np.full((LAYERS, 3), 5))
    manager.reserve(3)
    assert manager.lengths.sum() == 6 * 8
    assert manager.committed_lengths.sum() == 6 * 5
    manager.commit(1, 3)
    np.testing.assert_array_equal(manager.committed_lengths, manager.lengths)
    assert manager.tokens_per_device.sum() == 6 * 8
    manager.free(1)
    assert not manager.lengths.any()
    assert not manager.committed_lengths.any()
    assert not manager.used_pages.any()


def test_a_row_that_shrinks_gives_its_last_pages_back():
    """Those of tokens that are not committed yet remain, and the row goes on where they end."""
    manager, layout = make_manager(), make_layout()
    for row in range(2):
        occupy(manager, row, np.array([[40, PAGE, 11], [10, 10, 40]]))
    manager.reserve(5)
    manager.reserve(3)
    before = {
        tuple(pair): manager.pages_of(*pair).tolist() for pair in np.argwhere(manager.lengths)
    }
    manager.commit(0, 5)
    manager.commit(1, 5)
    kept = np.array([[13, 2 * PAGE - 3, 12], [1, PAGE, 45]])
    manager.shrink(1, kept)
    after = manager.lengths
    used = 0
    for (layer, row, slot), old in before.items():
        pages = manager.pages_of(layer, row, slot).tolist()
        assert pages == old[: len(pages)]
        assert len(pages) == -(-after[layer, row, slot] // PAGE)
        if row == 1:
            assert after[layer, row, slot] == kept[layer, layout.head_of_slot[layer, slot]] + 3
        used += len(pages)
    assert manager.used_pages.sum() == used < sum(map(len, before.values()))
    np.testing.assert_array_equal(manager._num_listed, manager.used_pages)
    lengths = manager.lengths
    assert manager.reserve(PAGE)
    np.testing.assert_array_equal(manager.lengths, lengths + PAGE * (lengths > 0))
    for row in range(2):
        manager.free(row)
    assert not manager.used_pages.any()
    assert not manager._num_listed.any()


@pytest.mark.parametrize("sharing", [1, 3])
def test_rows_share_a_prefix_as_often_as_the_tables_can_list_it(sharing: int):
    """Then the pages lack, as far as the scheduler is told; nothing has been taken."""
    spec = make_spec(pages_per_device=100, num_rows=60, sharing=sharing)
    manager = KVCacheManager(spec, make_layout())
    assert manager.reserve_prompt(0, np.full((LAYERS, 3), 8 * PAGE + 3)) is not None
    prefix = manager.retain(0)
    row = 0
    manager.free(0)
    while manager.share(row, prefix) is not None:
        manager.activate(row)
        row += 1
    per_row = np.bincount(prefix.devices, minlength=DEVICES).max()
    assert row >= (100 * sharing - 2 * per_row) // (per_row + 6)
    assert row < 60
    used = manager.used_pages
    assert manager.share(row, prefix) is None
    np.testing.assert_array_equal(manager.used_pages, used)
    for each in range(row):
        manager.free(each)
    manager.release(prefix)
    assert not manager.used_pages.any()


@pytest.mark.parametrize("seed", range(4))
def test_a_page_is_free_when_nobody_refers_to_it(seed: int):
    rng = np.random.default_rng(seed)
    pool = PagePool(DEVICES, 20)
    held: list[tuple[int, int]] = []
    for _ in range(300):
        choice = rng.integers(3)
        if choice == 0 and (pool.num_free > 3).all():
            devices = rng.integers(0, DEVICES, 3)
            pages = pool.take(devices)
            new = list(zip(devices.tolist(), pages.tolist(), strict=True))
            assert not set(new) & set(held)
            held += new
        elif held:
            some = [held[i] for i in rng.choice(len(held), min(3, len(held)), replace=False)]
            devices, pages = np.array(some).T
            if choice == 1:
                pool.retain(devices, pages)
                held += some
            else:
                pool.release(devices, pages)
                for each in some:
                    held.remove(each)
        expected = np.zeros((DEVICES, 20), int)
        np.add.at(expected, tuple(np.array(held, int).reshape(-1, 2).T), 1)
        np.testing.assert_array_equal(pool.references, expected)
        np.testing.assert_array_equal(pool.num_free, (expected == 0).sum(1))


def test_too_few_pages_name_the_device():
    pool = PagePool(2, 3)
    pool.take(np.array([0, 0]))
    with pytest.raises(RuntimeError, match="device 0 has 1 free pages, 2 are needed"):
        pool.take(np.array([1, 0, 0]))


@pytest.mark.parametrize("context", [8_192, 131_072, 1_048_576])
def test_tables_are_small_whatever_the_context(context: int):
    """Llama-3.3-70B on 8 devices of which each gives 100 GiB: 80 layers, 2 slots, 256 rows."""
    spec = KVCacheSpec.fit(
        800 << 30,
        1 << 40,
        num_layers=80,
        num_rows=256,
        num_devices=8,
        slots_per_device=2,
        head_dim=128,
        page_size=16,
        max_tokens=context,
        dtype="bfloat16",
    )
    pool = spec.pages_per_device * spec.page_bytes
    assert spec.table_bytes_per_device <= 0.01 * pool
    assert 0.999 * (100 << 30) < spec.bytes_per_device <= 100 << 30
    host = PageTables(spec) if context == 131_072 else None
    if host is not None:
        assert host.num_bytes <= 0.01 * pool * spec.num_devices


def test_the_least_pool_has_small_tables_too():
    """One that holds a single request of full length, for 64 rows."""
    for context in (8_192, 131_072):
        spec = KVCacheSpec(
            num_layers=32,
            num_rows=64,
            num_devices=1,
            slots_per_device=8,
            pages_per_device=32 * 8 * context // 16,
            head_dim=128,
            page_size=16,
            max_tokens=context,
            dtype="bfloat16",
        )
        assert spec.table_bytes_per_device <= 0.01 * spec.pages_per_device * spec.page_bytes
