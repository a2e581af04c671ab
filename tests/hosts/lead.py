"""Leads a group through scenarios, without HTTP: a process of its own, which prints the results.

The one argument is JSON: the host options, the checkpoint, the file of the schedule log, the
engine's options and the names of the scenarios.
"""

import json
import logging
import sys
from functools import partial
from pathlib import Path

from fairkv_jax.command_line import make_cpu_devices
from fairkv_jax.hosts.options import HostOptions
from tests.engine.logged import logged_engine
from tests.hosts.scenarios import SCENARIOS


def main() -> None:
    settings = json.loads(sys.argv[1])
    logging.basicConfig(level="INFO", format="%(name)s: %(message)s")
    make_cpu_devices(1)
    from fairkv_jax.hosts.leader import Leader
    from fairkv_jax.hosts.leading_runner import LeadingRunner

    leader = Leader(HostOptions(**settings["hosts"]), settings["step_timeout"])
    try:
        leader.join()
        engine = logged_engine(
            Path(settings["checkpoint"]),
            Path(settings["log"]),
            memory_bytes=leader.least_memory_bytes(),
            make_runner=partial(LeadingRunner, leader),
            **settings["engine"],
        )
        for name in settings["scenarios"]:
            print(json.dumps({name: SCENARIOS[name](engine)}), flush=True)
    except BaseException as error:
        logging.exception("the leader has failed")
        leader.fail(str(error))
        leader.end(1)
    leader.end(0)


if __name__ == "__main__":
    main()
