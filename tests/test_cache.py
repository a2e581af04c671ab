"""The book of pages against a model that keeps sets of pages, under random operations."""

import jax
import numpy as np
import pytest

from fairkv_jax.cache import KVCache, PageBook
from fairkv_jax.sharding.mesh import make_mesh

LAYERS, ROWS, DEVICES, SLOTS, PAGE = 2, 3, 2, 2, 8


def make_book(pages_per_device: int = 200, max_tokens: int = 64) -> PageBook:
    return PageBook(
        num_layers=LAYERS,
        num_rows=ROWS,
        num_devices=DEVICES,
        slots_per_device=SLOTS,
        pages_per_device=pages_per_device,
        page_size=PAGE,
        max_tokens=max_tokens,
    )


def full(length: int) -> np.ndarray:
    """The same length in every slot, [L, P*C]."""
    return np.full((LAYERS, DEVICES * SLOTS), length, np.int32)


class SimpleBook:
    """Which tokens each (layer, row, slot) holds, and the pages seen there."""

    def __init__(self, book: PageBook):
        self.book = book
        self.lengths = np.zeros((LAYERS, ROWS, DEVICES * SLOTS), int)

    def check(self) -> None:
        """Pages: as many as the lengths need, in range, none of them twice on a device."""
        book = self.book
        np.testing.assert_array_equal(book.lengths, self.lengths)
        owners: dict[tuple[int, int], tuple] = {}
        used = [0] * DEVICES
        for where in np.ndindex(self.lengths.shape):
            device = where[2] // SLOTS
            for index in range(-(-self.lengths[where] // PAGE)):
                page = int(book.page_table[*where, index])
                assert 0 <= page < book.pages_per_device
                assert (device, page) not in owners, f"{where} and {owners[device, page]}"
                owners[device, page] = where
                used[device] += 1
        assert book.used_pages.tolist() == used
        assert book.free_pages.tolist() == [book.pages_per_device - n for n in used]
        by_device = self.lengths.sum(1).reshape(LAYERS, DEVICES, SLOTS).sum(2)
        np.testing.assert_array_equal(book.load, by_device)


@pytest.mark.parametrize("seed", range(4))
def test_random_operations(seed: int):
    rng = np.random.default_rng(seed)
    book = make_book()
    simple = SimpleBook(book)
    for _ in range(120):
        row = int(rng.integers(ROWS))
        choice = rng.choice(["insert", "release", "grow", "grow", "grow"])
        if choice == "insert" and not simple.lengths[:, row].any():
            lengths = rng.integers(0, 40, full(0).shape) * (rng.random(full(0).shape) < 0.7)
            book.insert(row, lengths.astype(np.int32))
            simple.lengths[:, row] = lengths
        elif choice == "release":
            book.release(row)
            simple.lengths[:, row] = 0
        elif choice == "grow" and simple.lengths.max() <= 64 - PAGE:
            num_tokens = int(rng.integers(1, PAGE + 1))
            grown = simple.lengths + num_tokens * (simple.lengths > 0)
            last_page = (grown - 1) // PAGE
            opens = (simple.lengths > 0) & (last_page != (simple.lengths - 1) // PAGE)
            before = book.page_table.copy()
            growth = opens.reshape(LAYERS, ROWS, DEVICES, SLOTS).sum((0, 1, 3))
            missing = np.maximum(growth - book.free_pages, 0)
            np.testing.assert_array_equal(book.missing_pages(num_tokens), missing)
            new_pages = book.grow(num_tokens)
            np.testing.assert_array_equal(new_pages >= 0, opens)
            for where in np.argwhere(opens):
                before[*where, last_page[*where]] = new_pages[*where]
            np.testing.assert_array_equal(book.page_table, before)
            simple.lengths = grown
        simple.check()
    for row in range(ROWS):
        book.release(row)
    assert book.free_pages.tolist() == [200] * DEVICES


def test_a_page_opens_at_each_boundary_and_nowhere_else():
    book = make_book()
    lengths = full(0)
    lengths[0, 0] = PAGE - 1
    book.insert(0, lengths)
    opened = [(book.grow() >= 0).sum() for _ in range(2 * PAGE + 2)]
    assert np.flatnonzero(opened).tolist() == [1, PAGE + 1, 2 * PAGE + 1]
    assert book.used_pages.tolist() == [4, 0]


def test_missing_pages_name_the_device():
    book = make_book(pages_per_device=6)
    lengths = full(0)
    lengths[:, :SLOTS] = PAGE  # device 0: a full page in each of 4 slots, 2 pages free
    lengths[0, SLOTS] = PAGE
    book.insert(1, lengths)
    assert book.growth.tolist() == [4, 1]
    assert book.missing_pages().tolist() == [2, 0]
    with pytest.raises(RuntimeError, match="device 0 has 2 free pages, 4 are needed"):
        book.grow()


def test_pages_for_rounds_up_per_slot():
    lengths = np.array([[1, 8, 9, 0], [0, 0, 0, 17]], np.int32)
    assert make_book().pages_for(lengths).tolist() == [2, 5]


def test_released_pages_are_used_again():
    book = make_book(pages_per_device=4 * LAYERS * SLOTS)
    for _ in range(3):
        book.insert(0, full(4 * PAGE))
        assert book.free_pages.tolist() == [0, 0]
        book.release(0)


def test_the_pool_on_the_devices_is_split_evenly():
    mesh = make_mesh(DEVICES)
    cache = KVCache.empty(mesh, make_book(pages_per_device=10), head_dim=4, dtype="bfloat16")
    assert cache.k_pages.shape == cache.v_pages.shape == (DEVICES * 10, PAGE, 4)
    assert cache.k_pages.dtype == jax.numpy.bfloat16
    assert {s.data.shape for s in cache.k_pages.addressable_shards} == {(10, PAGE, 4)}
    assert {s.data.shape for s in cache.lengths.addressable_shards} == {(LAYERS, ROWS, SLOTS)}
    assert not np.asarray(cache.lengths).any()
