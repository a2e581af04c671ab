"""What copying a shared document to other replicas gains, by the cost model.

    python -m benchmarks.shared_document --profiles DIR

Rows begin with one compressed document, whose heads keep what published profiles say, and append a
question and an answer. They are routed as in the engine, with its rule for copies or without
copies. The profiles are measured, the times of attention are predictions of the cost model.
"""

import sys
from pathlib import Path

from absl import app, flags

from benchmarks.balance.published import read_profiles
from fairkv_jax.command_line import with_underscores
from fairkv_jax.plan import HARDWARE, default_cost, make_plan, simulate_document

DEVICES = (2, 4, 8)
ROWS = (8, 64)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: options begin with --")
    print(
        f"A document that keeps {_KEPT.value:,} tokens per head, {_NEW.value} more in every row. "
        "Utilization of the devices in attention: contiguous heads, Fair-Copying where every row "
        "is served where the document lies, and with copies; the time of attention that copies "
        "save; what they take, as a part of the document.\n\n"
        "model | scorer | devices | rows | static | one place | with copies | faster | copied\n"
        "---|---|---|---|---|---|---|---|---"
    )
    for published in read_profiles(Path(_PROFILES.value)):
        profile = published.at(_KEPT.value)
        for devices in (each for each in DEVICES if each <= profile.num_heads):
            for rows in ROWS:
                cost = default_cost(profile, devices, _HARDWARE.value, batch=rows)
                plans = [
                    make_plan(profile, devices, kind, cost=cost)
                    for kind in ("static", "fair_copying")
                ]
                found = [
                    simulate_document(plan, profile.array, rows, _NEW.value, copies=copies)
                    for plan, copies in ((plans[0], False), (plans[1], False), (plans[1], True))
                ]
                static, one, copied = found
                print(
                    f"{published.model.name} | {published.scorer} | {devices} | {rows} | "
                    f"{static.utilization:.2f} | {one.utilization:.2f} | {copied.utilization:.2f} "
                    f"| {one.seconds / copied.seconds:.2f}x | {copied.copied:.0%}"
                )


if __name__ == "__main__":
    _PROFILES = flags.DEFINE_string(
        "profiles", None, "Folder of profiles, see benchmarks.balance.", required=True
    )
    _HARDWARE = flags.DEFINE_enum("hardware", "H100", list(HARDWARE), "Hardware of the cost model.")
    _KEPT = flags.DEFINE_integer(
        "kept", 2048, "Tokens that a head keeps of the document, on average."
    )
    _NEW = flags.DEFINE_integer("new_tokens", 260, "Tokens of each question and answer.")
    app.run(main, argv=[with_underscores(argument) for argument in sys.argv])
