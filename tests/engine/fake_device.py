"""Executes scheduler outputs without a model, and checks that a real device could."""

import zlib

import numpy as np

from fairkv_jax.engine.scheduler_output import (
    ExecutionResult,
    KeptTokens,
    PrefillResult,
    SampledTokens,
    SchedulerOutput,
)
from fairkv_jax.kv_cache_spec import KVCacheSpec
from fairkv_jax.sharding.slots import SlotLayout


def token(request_id: str, index: int) -> int:
    """The token at a place of a request's output."""
    return zlib.crc32(f"{request_id} {index}".encode()) % 1000


class FakeDevice:
    """Rows, lengths and page tables as the devices hold them, and the tokens that they sample."""

    def __init__(self, spec: KVCacheSpec, layout: SlotLayout, *, keeps_all: bool = False):
        self.spec, self.layout = spec, layout
        self._keeps_all = keeps_all
        self.entries = np.full(spec.num_devices * spec.table_entries, -1)
        self.starts = np.zeros((spec.num_layers, spec.num_rows, spec.num_slots), int)
        self.lengths = np.zeros_like(self.starts)
        self.rows: dict[int, str] = {}
        self.prompts: dict[str, int] = {}
        self.prefilled: str | None = None
        """Whose compressed prompt waits for a row."""
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
        self.entries[update.entry_index] = update.entry_value
        self.starts.flat[update.start_index] = update.start_value
        if output.insertion is not None:
            self._insert(output)
        prefill = self._prefill(output) if output.prefill is not None else None
        return ExecutionResult(prefill, self._decode(output))

    def check_pages(self) -> None:
        """Every owned slot finds pages for its tokens, and no page serves two slots."""
        spec, seen = self.spec, set()
        for layer, row, slot in np.argwhere(self.lengths > 0):
            device = slot // spec.slots_per_device
            start = device * spec.table_entries + self.starts[layer, row, slot]
            count = -(-self.lengths[layer, row, slot] // spec.page_size)
            pages = self.entries[start : start + count]
            assert len(pages) == count
            assert ((pages >= 0) & (pages < spec.pages_per_device)).all()
            for page in pages.tolist():
                assert (device, page) not in seen, f"page {page} of device {device} serves twice"
                seen.add((device, page))

    def _kept(self, name: str) -> np.ndarray:
        """[L, K] kept tokens of a prompt: all, or some, another number for each head."""
        shape = (len(self.layout.head_of_slot), self.layout.num_heads)
        if self._keeps_all:
            return np.full(shape, self.prompts[name], np.int32)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return rng.integers(1, self.prompts[name] + 1, shape).astype(np.int32)

    def _insert(self, output: SchedulerOutput) -> None:
        insertion = output.insertion
        assert insertion is not None
        assert insertion.row not in self.rows, "the row is in use"
        assert self.prefilled == insertion.request_id, "its prompt is not there"
        name = insertion.request_id
        kept = self._kept(name)
        for layer, heads in enumerate(self.layout.head_of_slot):
            for head in range(self.layout.num_heads):
                owned = insertion.slot_lengths[layer, heads == head]
                assert sorted(owned)[-1] == owned.sum() == kept[layer, head], "one owner per head"
        expected = [token(name, i) for i in range(len(insertion.output_token_ids))]
        assert insertion.output_token_ids == expected
        assert expected
        self.rows[insertion.row] = name
        self.lengths[:, insertion.row] = insertion.slot_lengths
        self.prefilled = None

    def _prefill(self, output: SchedulerOutput) -> PrefillResult | None:
        chunks = output.prefill
        assert chunks is not None
        assert (chunks.new_request is not None) == (chunks.start == 0)
        if chunks.new_request is not None:
            name = chunks.new_request.request_id
            self.prompts[name] = len(chunks.new_request.prompt_token_ids)
            self._prefilling, self._chunks_done, self.prefilled = name, 0, None
        assert self._prefilling == chunks.request_id
        assert chunks.start == self._chunks_done < chunks.stop <= chunks.num_chunks
        self._chunks_done = chunks.stop
        if not chunks.is_last:
            return None
        self.prefilled = name = chunks.request_id
        kept = KeptTokens(self._kept(name), None)
        first = sampled([[token(name, 0)]]) if chunks.samples_token else None
        return PrefillResult(kept, first, None)

    def _decode(self, output: SchedulerOutput) -> SampledTokens | None:
        decode = output.decode
        if decode is None:
            return None
        assert {each.row: each.request_id for each in decode.rows} == self.rows
        tokens = np.zeros((decode.num_steps, self.spec.num_rows), int)
        for each in decode.rows:
            assert each.position == self.prompts[each.request_id] + each.output_index - 1
            grown = self.lengths[:, each.row].max() - self._kept(each.request_id).max()
            assert grown == each.output_index - 1, "as many tokens are cached as were appended"
            for step in range(decode.num_steps):
                tokens[step, each.row] = token(each.request_id, each.output_index + step)
        self.lengths += decode.num_steps * (self.lengths > 0)
        self.check_pages()
        return sampled(tokens)


def sampled(tokens: object) -> SampledTokens:
    tokens = np.asarray(tokens)
    zeros = np.zeros(tokens.shape)
    return SampledTokens(tokens, zeros, zeros, zeros[..., None], zeros[..., None])
