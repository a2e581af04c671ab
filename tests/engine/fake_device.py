"""Executes scheduler outputs without a model, and checks that a real device could."""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fairkv_jax.engine.page_tables import PageCopies, PageReplication
from fairkv_jax.engine.scheduler_output import (
    ExecutionResult,
    Fork,
    Insertion,
    KeptTokens,
    PrefillChunks,
    PrefillResult,
    RowCompression,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.sharding.slots import SlotLayout


def token(request_id: str, index: int) -> int:
    """The token at a place of a request's output."""
    return zlib.crc32(f"{request_id} {index}".encode()) % 1000


class FakeDevice:
    """Rows, lengths, page tables and pages as the devices hold them, and the tokens they sample.

    In place of keys and values a page holds a number for each of its tokens, which tells from
    which segment of which prompt, or from which output, it comes.
    """

    def __init__(self, spec: KVCacheSpec, layout: SlotLayout, *, keeps_all: bool = False):
        self.spec, self.layout = spec, layout
        self._keeps_all = keeps_all
        self.entries = np.full((spec.num_devices, spec.table_entries), -1)
        self.starts = np.zeros((spec.num_layers, spec.num_rows, spec.num_slots), int)
        self.lengths = np.zeros_like(self.starts)
        self.pages = np.zeros((spec.num_devices, spec.pages_per_device, spec.page_size), int)
        self.rows: dict[int, str] = {}
        self.contents: dict[tuple[int, int, int], list[int]] = {}
        """What a decoding row holds, by (layer, row, slot)."""
        self.compressions: dict[str, dict[int, np.ndarray]] = {}
        """By request and position, what its heads kept when its row was compressed again."""
        self.prompts: dict[str, list[int]] = {}
        """The tokens of every prompt up to the end of the segment that was prefilled last."""
        self.segments: dict[str, list[int]] = {}
        """Where its segments end."""
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """The same by the tokens, for prompts that begin with them."""
        self._known: dict[tuple, np.ndarray] = {}
        """The contents that have been computed; tests spend most of their time on them."""
        self.num_prefilled_tokens = 0
        self.prefilled: list[str] = []
        """Whose compressed segments wait for a row."""
        self._whole: set[tuple[int, ...]] = set()
        """Prompts of which nothing is dropped."""
        self._shared_row: int | None = None
        self._chunks_done = 0
        self.has_failed = False

    def execute(self, output: SchedulerOutput) -> ExecutionResult:
        assert output.resets_cache == self.has_failed
        self.has_failed = False
        for row in output.released_rows:
            self.rows.pop(row, None)
            self.lengths[:, row] = 0
        update = output.page_table_update
        assert len(np.unique(update.entry_index)) == len(update.entry_index)
        self.entries.reshape(-1)[update.entry_index] = update.entry_value
        self.starts.flat[update.start_index] = update.start_value
        self._replicate(output.replications_before_insertion)
        for insertion in output.insertions:
            self._insert(insertion)
        self._replicate(output.replications_before_prefill)
        prefill = self._prefill(output.prefill) if output.prefill is not None else None
        compressed = tuple(map(self._compress, output.compressions))
        return ExecutionResult(prefill, self._decode(output), compressed)

    def check_rows(self) -> None:
        """Every row finds in its pages what was kept of its prompt and of its output."""
        for row in self.rows:
            for layer, slot in np.argwhere(self.lengths[:, row] > 0).tolist():
                self._check_slot(layer, row, slot, self.contents[layer, row, slot])

    def _check_slot(self, layer: int, row: int, slot: int, expected: list[int]) -> None:
        device, pages, places = self._at(row, layer, slot, len(expected))
        assert ((pages >= 0) & (pages < self.spec.pages_per_device)).all()
        assert self.pages[device, pages, places].tolist() == expected
        assert self.lengths[layer, row, slot] in (0, len(expected))

    def _compress(self, compression: RowCompression) -> np.ndarray:
        """Lets every head keep its prefix, its last token, and some of the others.

        A request that is compressed again at the same position keeps the same.
        """
        name, row = compression.request_id, compression.row
        assert self.rows[row] == name
        assert self.lengths[:, row].max() == compression.num_tokens
        kept = np.zeros((len(self.layout.head_of_slot), self.layout.num_heads), np.int32)
        for layer, slot in np.argwhere(self.lengths[:, row] > 0).tolist():
            head = self.layout.head_of_slot[layer, slot]
            before = self.contents[layer, row, slot]
            output_length = compression.position + 1 - len(self.prompts[name])
            assert before[-1] == -1 - token(name, output_length - 1), "it is up to date"
            fixed = int(compression.fixed_lengths[layer, head])
            origin = zlib.crc32(repr((name, compression.position, layer, head)).encode())
            keeps = np.random.default_rng(origin).random(len(before)) < 0.6
            keeps[:fixed] = keeps[-1] = True
            after = [value for value, keep in zip(before, keeps, strict=True) if keep]
            device, pages, places = self._at(row, layer, slot, len(after))
            self.pages[device, pages[fixed:], places[fixed:]] = after[fixed:]
            self.contents[layer, row, slot] = after
            self.lengths[layer, row, slot] = kept[layer, head] = len(after)
        history = self.compressions.setdefault(name, {})
        np.testing.assert_array_equal(history.setdefault(compression.position, kept), kept)
        return kept

    def _kept(self, prompt: Sequence[int], start: int) -> np.ndarray:
        """[L, K] kept tokens of a segment: all, or some, another number for each head."""
        shape = (len(self.layout.head_of_slot), self.layout.num_heads)
        if self._keeps_all or tuple(prompt) in self._whole:
            return np.full(shape, len(prompt) - start, np.int32)
        return _random_lengths(start, tuple(prompt), shape)

    def _contents(self, name: str, layer: int, head: int) -> np.ndarray:
        """What stands for the tokens that a head keeps of a prompt."""
        key = (tuple(self.prompts[name]), tuple(self.segments[name]), layer, head)
        if key not in self._known:
            self._known[key] = self._computed_contents(name, layer, head)
        return self._known[key]

    def _computed_contents(self, name: str, layer: int, head: int) -> np.ndarray:
        prompt, start, parts = self.prompts[name], 0, []
        for stop in self.segments[name]:
            kept = self._kept(prompt[:stop], start)[layer, head]
            origin = zlib.crc32(repr((layer, head, start, prompt[:stop])).encode())
            parts.append(origin + np.arange(kept))
            start = stop
        return np.concatenate(parts)

    def _at(self, row: int, layer: int, slot: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The device, pages and places of a slot's first `stop` tokens of a row."""
        device, token = slot // self.spec.slots_per_device, np.arange(stop)
        entry = self.starts[layer, row, slot] + token // self.spec.page_size
        return device, self.entries[device, entry], token % self.spec.page_size

    def _check(self, row: int, lengths: np.ndarray, name: str) -> None:
        """Compares pages with what stands for a prompt."""
        for layer, slot in np.argwhere(lengths > 0).tolist():
            device, pages, places = self._at(row, layer, slot, int(lengths[layer, slot]))
            assert ((pages >= 0) & (pages < self.spec.pages_per_device)).all()
            found = self.pages[device, pages, places]
            prompt = self._contents(name, layer, int(self.layout.head_of_slot[layer, slot]))
            assert found.tolist() == prompt.tolist()

    def _insert(self, insertion: Insertion) -> None:
        row, name = insertion.row, insertion.request_id
        assert row not in self.rows, "the row is in use"
        if insertion.fork is not None:
            self._fork(insertion, insertion.fork)
            return
        assert name in self.prefilled, "its segment is not there"
        assert self._shared_row in (None, row), "another row holds what comes before"
        for layer, heads in enumerate(self.layout.head_of_slot):
            for head in range(self.layout.num_heads):
                contents = self._contents(name, layer, head)
                owned = insertion.slot_lengths[layer, heads == head]
                assert sorted(owned)[-1] == owned.sum() == len(contents), "one owner per head"
                slot = int(np.flatnonzero((heads == head) & (insertion.slot_lengths[layer] > 0))[0])
                device, pages, places = self._at(row, layer, slot, len(contents))
                start = len(contents) - self._kept(*self._last_segment(name))[layer, head]
                self.pages[device, pages[start:], places[start:]] = contents[start:]
        expected = [token(name, i) for i in range(len(insertion.output_token_ids))]
        assert insertion.output_token_ids == expected
        self._check(row, insertion.slot_lengths, name)
        if insertion.is_last:
            assert expected
            self._activate(insertion)
        self.prefilled.remove(name)
        self._shared_row = None

    def _fork(self, insertion: Insertion, fork: Fork) -> None:
        """Another row's prompt, in pages that both have, and copies of the last ones."""
        row, name, prompt = insertion.row, insertion.request_id, fork.new_request.prompt_token_ids
        self._copy_pages(fork.page_copies)
        self.prompts[name], self.segments[name] = prompt, self._ends[tuple(prompt)]
        assert insertion.output_token_ids
        expected = [token(name, i) for i in range(len(insertion.output_token_ids))]
        assert insertion.output_token_ids == expected
        self._check(row, insertion.slot_lengths, name)
        self._activate(insertion)

    def _activate(self, insertion: Insertion) -> None:
        """Lets a row decode that holds a request's prompt."""
        row, name = insertion.row, insertion.request_id
        self.rows[row] = name
        self.lengths[:, row] = insertion.slot_lengths
        for layer, slot in np.argwhere(insertion.slot_lengths > 0).tolist():
            head = int(self.layout.head_of_slot[layer, slot])
            self.contents[layer, row, slot] = self._contents(name, layer, head).tolist()

    def _copy_pages(self, copies: PageCopies) -> None:
        self.pages[copies.devices, copies.target] = self.pages[copies.devices, copies.source]

    def _replicate(self, replications: Sequence[PageReplication]) -> None:
        for each in replications:
            assert (each.source_devices != each.target_devices).all()
            copied = self.pages[each.source_devices, each.source]
            self.pages[each.target_devices, each.target] = copied

    def _last_segment(self, name: str) -> tuple[list[int], int]:
        """The prompt up to the end of its last segment, and where that starts."""
        return self.prompts[name], [0, *self.segments[name]][-2]

    def _prefill(self, chunks: PrefillChunks) -> PrefillResult | None:
        assert (chunks.new_request is not None) == (chunks.start == 0)
        name, prefix = chunks.request_id, chunks.cached_prefix
        if chunks.new_request is not None:
            before = [] if prefix is None else prefix.token_ids
            prompt = [*before, *chunks.new_request.prompt_token_ids]
            self.prompts[name] = prompt
            self.segments[name] = [*self._ends.get(tuple(before), []), len(prompt)]
            self._ends[tuple(prompt)] = self.segments[name]
            self.num_prefilled_tokens += len(chunks.new_request.prompt_token_ids)
            self._prefilling, self._chunks_done, self.prefilled = name, 0, []
            self._shared_row, self._packed = None, [each.request_id for each in chunks.packed]
            for each in (chunks.new_request, *chunks.packed):
                if each.keeps_whole:
                    self._whole.add(tuple(each.prompt_token_ids))
            for each in chunks.packed:
                assert chunks.new_request.keeps_whole
                assert each.keeps_whole
                self.prompts[each.request_id] = each.prompt_token_ids
                self.segments[each.request_id] = [len(each.prompt_token_ids)]
                self.num_prefilled_tokens += len(each.prompt_token_ids)
        if prefix is not None:
            assert prefix.row not in self.rows
            assert not self.lengths[:, prefix.row].any()
            assert prefix.page_copies is not None
            self._copy_pages(prefix.page_copies)
            self._shared_row = prefix.row
            self._prefix_lengths = prefix.slot_lengths
        assert self._prefilling == name
        assert chunks.start == self._chunks_done < chunks.stop <= chunks.num_chunks
        if self._shared_row is not None:
            self._check_prefix(name)
        self._chunks_done = chunks.stop
        if not chunks.is_last:
            return None
        self.prefilled = [name, *self._packed]
        kept = KeptTokens(self._kept(*self._last_segment(name)), None)
        names = [name, *(each.request_id for each in chunks.also_samples), *self._packed]
        first = sampled([[token(each, 0) for each in names]]) if chunks.samples_token else None
        return PrefillResult(kept, first, None)

    def _check_prefix(self, name: str) -> None:
        """The row that a prefill reads holds what was kept before its segment."""
        assert self._shared_row is not None
        whole, ends = self.prompts[name], self.segments[name]
        self.prompts[name], self.segments[name] = whole[: ends[-2]], ends[:-1]
        self._check(self._shared_row, self._prefix_lengths, name)
        self.prompts[name], self.segments[name] = whole, ends

    def _decode(self, output: SchedulerOutput) -> SampledTokens | None:
        decode = output.decode
        if decode is None:
            return None
        assert {each.row: each.request_id for each in decode.rows} == self.rows
        tokens = np.zeros((decode.num_steps, self.spec.num_rows), int)
        for each in decode.rows:
            name, row = each.request_id, each.row
            assert each.position == len(self.prompts[name]) + each.output_index - 1
            for step in range(decode.num_steps):
                tokens[step, row] = token(name, each.output_index + step)
                self._append(row, -1 - token(name, each.output_index + step - 1))
        self.check_rows()
        return sampled(tokens)

    def _append(self, row: int, value: int) -> None:
        """Writes one more token to every slot that owns a part of a row."""
        self.lengths[:, row] += self.lengths[:, row] > 0
        for layer, slot in np.argwhere(self.lengths[:, row] > 0):
            device, pages, places = self._at(row, layer, slot, self.lengths[layer, row, slot])
            self.pages[device, pages[-1], places[-1]] = value
            self.contents[layer, row, slot].append(value)


@lru_cache(maxsize=10_000)
def _random_lengths(start: int, prompt: tuple[int, ...], shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng([start, *prompt])
    lengths = rng.integers(1, len(prompt) - start + 1, shape).astype(np.int32)
    lengths.flags.writeable = False
    return lengths


def sampled(tokens: object) -> SampledTokens:
    tokens = np.asarray(tokens)
    zeros = np.zeros(tokens.shape)
    return SampledTokens(tokens, zeros, zeros, zeros[..., None], zeros[..., None])
