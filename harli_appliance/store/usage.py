"""One row for each served request, in a database of its own.

Losing the last rows in a power cut is fine here, so this file pays 19 us a row (synchronous=NORMAL) where
job state pays 330, and its writes never wait behind a job's. The oldest rows go when it is opened.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from sqlite_utils import Database as Connection

from harli_appliance.store.database import Database

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
        database = await Database.open(home / USAGE_FILE, migrations="harli-metrics", synchronous="NORMAL")

        def forget_old(db: Connection) -> None:
            db.execute(
                "DELETE FROM requests WHERE seq <= (SELECT coalesce(max(seq), 0) FROM requests) - ?",
                [kept_rows],
            )

        await database.run(forget_old)
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
