"""Writing the ledger's rows: rows that come together go into one file, and on S3 small objects into larger ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from merge_ray.errors import LedgerError
from merge_ray.leaderboard.rows import ROW_SCHEMA, read_files, row_files, without_doubles
from merge_ray.results import Results

Row = Mapping[str, Any]

MOST_SMALL = 256
"""So many small objects are compacted into one."""
SMALL_BYTES = 2**20


class RowWriter:
    """Makes rows durable, from many threads.

    Rows that come while others are being written go into one file together (group commit). On S3, small objects are
    compacted: the larger one is put first and the small ones are removed then, so that a crash between the two loses
    nothing, and what stands twice is read once. Files of several rows, and objects, are named by their content, so
    that nothing is ever replaced by other rows, or removed in the place of others.
    """

    def __init__(self, results: Results, most_small: int = MOST_SMALL) -> None:
        self.results, self.most_small = results, most_small
        self._coming = threading.Lock()
        self._writing = threading.Lock()
        self._waiting: list[tuple[str, Row, Future[None]]] = []

    def add(self, name: str, row: Row) -> None:
        """Make a row durable, named by its candidate; raises :class:`LedgerError` if it cannot be."""
        written: Future[None] = Future()
        with self._coming:
            self._waiting.append((name, row, written))
        with self._writing:
            if not written.done():
                self._write_waiting()
        written.result()

    def find(self, identity: str) -> Row:
        """A candidate's row, of whichever study."""
        with self._writing:
            files = row_files(self.results.directory)
            named = [file for file in files if Path(file).name.startswith(identity)]
            found = read_files(named or files).filter(pads.field("identity") == identity)
            row: Row = without_doubles(found).slice(0, 1).to_pylist()[0]
            return row

    def compact(self, most_small: int = 1) -> None:
        """Write the small objects as one, if there are more than so many of them on S3."""
        if self.results.on_s3:
            with self._writing:
                self._compact(most_small)

    def _write_waiting(self) -> None:
        with self._coming:
            waiting, self._waiting = self._waiting, []
        try:
            self._write({name: row for name, row, _ in waiting})
        except BaseException as error:
            for *_, written in waiting:
                written.set_exception(error)
            return
        for *_, written in waiting:
            written.set_result(None)
        if self.results.on_s3:
            try:
                self._compact(self.most_small)
            except LedgerError:
                # The rows are safe; to compact them is tried again later.
                self.most_small *= 2

    def _write(self, rows: Mapping[str, Row]) -> None:
        table = pa.Table.from_pylist(list(map(dict, rows.values())), schema=ROW_SCHEMA)
        name = next(iter(rows)) if len(rows) == 1 else "rows"
        if len(rows) == 1 and not self.results.on_s3:
            self.results.write(f"trials/{name}.parquet", partial(pq.write_table, table))
        else:
            self._write_object(name, table)

    def _write_object(self, stem: str, rows: pa.Table) -> Path:
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer)
        content = buffer.getvalue()
        name = f"{stem}-{hashlib.sha256(content).hexdigest()[:32]}"
        return self.results.write(f"trials/{name}.parquet", lambda file: file.write(content))

    def _compact(self, most_small: int) -> None:
        files = [Path(file) for file in row_files(self.results.directory)]
        small = [file for file in files if file.stat().st_size < SMALL_BYTES]
        if len(small) > most_small:
            whole = self._write_object("rows", without_doubles(read_files([str(file) for file in small])))
            self.results.remove(*(f"trials/{file.name}" for file in small if file != whole))
