"""When a run saves and what becomes of it: beside training, or waited for at the end and when asked to stop."""

from __future__ import annotations

from typing import Any

from nanopoe import dist
from nanopoe.checkpoint import Outcome
from nanopoe.errors import StorageError, everywhere
from nanopoe.train.build import Run
from nanopoe.train.drift import compare_ranks
from nanopoe.train.status import Status
from nanopoe.train.watch import Watch


class Saves:
    """The saves of one life of a run. Every method is called by all ranks alike.

    A save that the disk refuses does not stop the run: it is warned of and tried again when the next one is due. After
    checkpoint.max_failed in a row, or when it was the last chance, it is a StorageError. Any other error is raised.
    """

    def __init__(self, run: Run, watch: Watch, status: Status):
        self.run, self.watch, self.status = run, watch, status
        self.newest = run.step              # the step of the newest save that was begun or resumed from
        self._failed = 0                    # in a row

    def save(self, position: dict[str, Any], wait: bool) -> None:
        """Save the present step, with the data position after the last batch trained on. Collective.

        The ranks are compared first: what they do not agree on must not become a checkpoint.
        """
        run = self.run
        compare_ranks(run.optimizer, run.world)
        state = {"step": run.step, "tokens": run.tokens, "optimizer_steps": run.optimizer.steps,
                 "lineage": run.lineage, "position": position}
        self.newest = run.step
        dist.mark("save", run.step)         # which waits for the one before, if that is still under way
        run.saver.save(state)
        if wait:
            self._wait(last=True)

    def take(self, finished: int) -> None:
        """Take the outcome of a save if all ranks have it; `finished` is how many do."""
        if finished == self.run.world.size:
            outcome = self.run.saver.poll()
            assert outcome is not None
            self._tell(outcome, last=False)

    def finish(self, position: dict[str, Any] | None) -> None:
        """Wait until all that was trained is on the disk; `position` is null if nothing was. Collective."""
        self._wait(last=False)
        if position is not None and self.newest < self.run.step:          # never begun, or refused by the disk
            self.save(position, wait=True)

    def _wait(self, last: bool) -> None:
        dist.mark("save", self.run.step)
        self.run.saver.close()
        while (outcome := self.run.saver.poll()) is not None:
            self._tell(outcome, last=last and outcome.step == self.run.step)

    def _tell(self, outcome: Outcome, last: bool) -> None:
        for warning in outcome.warnings:
            self.watch.event("warning", what=warning)
        error = outcome.error
        if error is None:
            self._failed = 0
            self.watch.event("checkpoint", path=str(outcome.path), held=round(outcome.held_s, 3),
                             seconds=round(outcome.total_s, 2))
            self.status.tell("running", self.run.step)
            return
        self._failed += 1
        self.newest = min(self.newest, outcome.step - 1)
        limit = self.run.experiment.checkpoint.max_failed
        if last or not isinstance(error, StorageError) or self._failed >= limit:
            raise everywhere(error) if isinstance(error, StorageError) else error
        self.watch.event("warning", what=f"step {outcome.step} was not saved ({self._failed} of {limit} in a row): "
                                         f"{error.render()}; training goes on")
