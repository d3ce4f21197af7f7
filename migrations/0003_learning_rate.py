"""Schedule of the learning rate and clipping of gradients; jobs of before had the defaults."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0007_learning_rate(db: Database) -> None:
    db.execute(
        "ALTER TABLE jobs ADD COLUMN lr_scheduler_type TEXT NOT NULL DEFAULT 'cosine' "
        "CHECK (lr_scheduler_type IN ('cosine', 'linear', 'constant'))"
    )
    db.execute(
        "ALTER TABLE jobs ADD COLUMN warmup_ratio REAL NOT NULL DEFAULT 0.1 "
        "CHECK (warmup_ratio >= 0 AND warmup_ratio <= 1)"
    )
    db.execute(
        "ALTER TABLE jobs ADD COLUMN max_grad_norm REAL NOT NULL DEFAULT 1.0 CHECK (max_grad_norm >= 0)"
    )
