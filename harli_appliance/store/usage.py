"""One row for each served request, in a database of its own.

Losing the last rows in a power cut is fine here, so this file pays 19 us a row (synchronous=NORMAL) where
job state pays 330, and its writes never wait behind a job's. The oldest rows go when it is opened.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog
from sqlite_utils import Database as Connection

from harli_appliance.errors import HarliError
from harli_appliance.store.database import Database

log = structlog.get_logger(__name__)

USAGE_FILE = "harli-metrics.db"
KEPT_ROWS = 1_000_000


@dataclass(frozen=True, slots=True)
class RequestUsage:
    """A finished request. `ttft_ms` and `tpot_ms` are None where too few tokens came to tell."""

    id: str
    model: str
    prompt_tokens: int
    output_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    finish_reason: str
    created_at: int


class UsageLog:
    """Append-only. Build it with `open`, and `close` it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    async def open(cls, home: Path, kept_rows: int = KEPT_ROWS) -> UsageLog:
        """Open or create the log; one that is damaged is moved aside, and a new one begun.

        Raises:
            ConfigError, ApplianceUnavailable: it cannot be used.
        """
        try:
            return await cls._open(home, kept_rows)
        except HarliError as error:
            if error.code != "database_damaged":
                raise
            aside = f"{USAGE_FILE}-damaged-{time.strftime('%Y%m%d-%H%M%S')}"
            log.warning("the usage log is damaged; a new one is begun", why=error.message, moved_to=aside)
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    (home / f"{USAGE_FILE}{end}").rename(home / f"{aside}{end}")
            return await cls._open(home, kept_rows)

    @classmethod
    async def _open(cls, home: Path, kept_rows: int) -> UsageLog:
        database = await Database.open(home / USAGE_FILE, migrations="harli-metrics", synchronous="NORMAL")

        def forget_old(db: Connection) -> None:
            db.execute(
                "DELETE FROM requests WHERE seq <= (SELECT coalesce(max(seq), 0) FROM requests) - ?",
                [kept_rows],
            )

        try:
            await database.run(forget_old)
        except BaseException:
            await database.close()
            raise
        return cls(database)

    async def add(self, usage: RequestUsage) -> None:
        await self._database.run(lambda db: db.table("requests").insert(asdict(usage)))

    async def recent(self, limit: int = 100) -> list[RequestUsage]:
        """The newest first."""
        columns = ", ".join(RequestUsage.__slots__)
        return await self._database.run(
            lambda db: [
                RequestUsage(**row)
                for row in db.table("requests").rows_where(select=columns, order_by="seq DESC", limit=limit)
            ]
        )

    async def close(self) -> None:
        await self._database.close()
