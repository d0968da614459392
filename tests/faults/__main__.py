"""Run the fault suite: hurt real runs on purpose and check what must hold afterwards."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import commit, process, resume  # noqa: F401  they register their faults
from tests.faults.harness import FAULTS, Room

EXAMPLES = """examples:
  python -m tests.faults                    all of them, about three quarters of an hour on 2 cores
  python -m tests.faults --short            the form that is part of make test
  python -m tests.faults F1 F10 --seed 3    some of them, drawn otherwise"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"which faults: {' '.join(FAULTS)} [all]")
    parser.add_argument("--short", action="store_true", help="few trials of each")
    parser.add_argument("--trials", type=int, help="so many trials of each")
    parser.add_argument("--seed", type=int, default=0, help="what trials are drawn from [0]")
    args = parser.parse_args()
    unknown = [i for i in args.ids if i not in FAULTS]
    if unknown:
        parser.error(f"no fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    print(f"{'id':4} {'trials':>6} {'failures':>8} {'seconds':>8}  what", flush=True)
    failed = 0
    for fault in (FAULTS[i] for i in args.ids or FAULTS):
        if args.short and not fault.short:                 # too long for a short form
            continue
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            start = time.monotonic()
            trials = args.trials or (fault.short if args.short else fault.full)
            report = fault.run(Room(Path(folder), args.seed), trials)
            seconds = time.monotonic() - start
        remark = f" ({report.note})" if report.note else ""
        print(f"{fault.id:4} {report.trials:6d} {len(report.failures):8d} {seconds:8.1f}  {fault.what}{remark}",
              flush=True)
        for line in report.failures[:10]:
            print(f"       {line}", flush=True)
        failed += len(report.failures)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
