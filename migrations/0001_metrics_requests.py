"""One row for each served request, in the metrics database (which may lose its last rows in a power cut)."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli-metrics")


@migrations()
def m0001_requests(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE requests (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL,
            model TEXT NOT NULL,
            prompt_tokens INTEGER NOT NULL CHECK (prompt_tokens >= 0),
            output_tokens INTEGER NOT NULL CHECK (output_tokens >= 0),
            ttft_ms REAL,
            tpot_ms REAL,
            finish_reason TEXT NOT NULL,
            created_at INTEGER NOT NULL
        )
        """
    )
    db.execute("CREATE INDEX requests_by_time ON requests (created_at)")
