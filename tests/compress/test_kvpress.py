"""The engine on the demo model keeps what NVIDIA/kvpress keeps.

data/kvpress.npz holds the positions that kvpress 0.5.5 kept with torch 2.13.0, in float32 on CPU
and with the same weights: 300 tokens at ratio 0.5 and 640 tokens at ratio 0.8. It is a part of what
`python -m benchmarks.kvpress_parity.record --lengths 300 640` wrote.
"""

from pathlib import Path

import pytest

from benchmarks.kvpress_parity.cases import CASES, SIZES, Case, Recorded, Size, num_differing
from benchmarks.kvpress_parity.engine import keep

RECORDED = Recorded.load(Path(__file__).parent / "data" / "kvpress.npz")
TOLERANCE = 1e-3
"""The share of positions that may differ: scores that are equal up to rounding."""
SHORT = ("snapkv-ada", "expected_attention-ada", "keydiff-ada", "knorm-uniform")
"""The cases of the short form, at one size; the tiny model has all methods in this folder."""
PAIRS = [
    pytest.param(
        case,
        size,
        id=f"{case.name}-{size.name}",
        marks=[] if case.name in SHORT and size is SIZES[1] else [pytest.mark.long],
    )
    for case in CASES
    for size in SIZES
    if any((case.name, size.name, index) in RECORDED.kept for index in (0, 1))
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("case", "size"), PAIRS)
def test_kept_positions(demo_checkpoint: Path, case: Case, size: Size):
    for index, kept in keep(demo_checkpoint, case, size, RECORDED).items():
        want = RECORDED.kept[case.name, size.name, index]
        assert num_differing(kept, want) <= TOLERANCE * want.sum()
