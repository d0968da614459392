"""A dataset of the hub as an origin, streamed by the `datasets` library. No code of the dataset is run.

A local folder that `datasets` can read works in place of an id, so everything here runs without a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanopoe.data.ingest import TEXT, Bad, Raw, Shape, Unit
from nanopoe.errors import DataError

_CHECK = "check the id, --revision, --config, --split and --files, that the network is there, and, if the dataset " \
         "is gated, that you have its access and are logged in (hf auth login)"
_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".jsonl.zst": "json",
             ".json.gz": "json", ".txt": "text"}


@dataclass(frozen=True)
class Hub:
    """A unit is a file (or another shard) of the dataset. `files` is a pattern of its files, read without its config.

    `revision` is a full commit after `resolved()`.
    """

    dataset: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    files: str | None = None
    shape: Shape = TEXT
    license: str | None = None

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "hub", "dataset": self.dataset, "revision": self.revision, "config": self.config,
                "split": self.split, "files": self.files, "license": self.license,
                **self.shape.told}

    @property
    def label(self) -> str:
        return f"dataset {self.dataset} "

    @property
    def _local(self) -> bool:
        return Path(self.dataset).is_dir()

    def resolved(self, before: dict[str, Any] | None = None) -> Hub:
        """With the commit and the license the hub knows; `before` is the source of an ingest that is to go on.

        Without a wanted revision an ingest that goes on stays at its own.
        """
        if self._local:
            return self
        if before and self.revision is None and before.get("dataset") == self.dataset:
            return replace(self, revision=before["revision"], license=self.license or before["license"])
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self.dataset, revision=self.revision)
        except Exception as error:                           # its errors have no common base
            raise self._cannot("opened", error) from error
        card = info.card_data.to_dict() if info.card_data else {}
        stated = card.get("license")
        return replace(self, revision=info.sha,
                       license=self.license or (", ".join(stated) if isinstance(stated, list) else stated))

    def units(self) -> list[Unit]:
        stream = self._open()
        return [Unit(f"shard {i} of {stream.num_shards}", None, (str(i),)) for i in range(stream.num_shards)]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        stream = self._open()
        rows = iter(stream.shard(num_shards=stream.num_shards, index=int(unit.items[0])).skip(start))
        number = start
        while True:
            where = f"{unit.name} row {number}"
            try:
                row = next(rows, None)
            except Exception as error:
                raise self._cannot("read", error, where) from error
            if row is None:
                break
            yield self.shape.of_row(row, where), 0
            number += 1
        if number == 0:
            raise DataError("no rows", f"{self.label}{unit.name}", "choose another --split or --files")

    def _open(self) -> Any:
        """A stream of the wanted columns alone."""
        import datasets  # slow to import, and only this source needs it

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        datasets.disable_progress_bars()
        try:
            builder = datasets.load_dataset_builder(*self._where(), **self._what())
            stream = builder.as_streaming_dataset(split=self.split)
            if not self.shape.whole_rows and hasattr(builder.config, "columns"):
                self._check(stream.features)
                builder.config.columns = [self.shape.column]             # parquet reads no other then
                stream = builder.as_streaming_dataset(split=self.split)
        except DataError:
            raise
        except Exception as error:
            raise self._cannot("opened", error) from error
        if self.shape.whole_rows:
            return stream
        self._check(stream.features)
        return stream.select_columns([self.shape.column]) if stream.features else stream

    def _check(self, features: Any) -> None:
        if features and self.shape.column not in features:
            raise DataError(f"no column '{self.shape.column}', there is: {', '.join(features)[:200]}",
                            self.label.strip(), "name the text column with --column")

    def _where(self) -> tuple[str, ...]:
        if self.files is None:
            return (self.dataset,)
        for suffix, builder in _BUILDERS.items():
            if self.files.endswith(suffix):
                return (builder,)
        raise DataError(f"{self.files!r}: unknown kind of file", self.label.strip(),
                        f"known are {' '.join(_BUILDERS)}")

    def _what(self) -> dict[str, Any]:
        if self.files is None:
            return {"name": self.config, "revision": None if self._local else self.revision}
        at = self.dataset if self._local else f"hf://datasets/{self.dataset}@{self.revision or 'main'}"
        return {"data_files": {self.split: f"{at}/{self.files}"}}

    def _cannot(self, what: str, error: Exception, where: str = "") -> DataError:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        return DataError(f"cannot be {what} ({reason})", f"{self.label}{where}".strip(), _CHECK)
