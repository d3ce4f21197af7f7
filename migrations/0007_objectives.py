"""What a file's lines are, and what a job minimises; before there were only chats and supervised finetuning."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0011_objectives(db: Database) -> None:
    db.execute(
        "ALTER TABLE files ADD COLUMN format TEXT NOT NULL DEFAULT 'chat' "
        "CHECK (format IN ('chat', 'text', 'preference'))"
    )
    db.execute(
        "ALTER TABLE jobs ADD COLUMN method TEXT NOT NULL DEFAULT 'supervised' "
        "CHECK (method IN ('supervised', 'dpo'))"
    )
    db.execute("ALTER TABLE jobs ADD COLUMN beta REAL NOT NULL DEFAULT 0.1 CHECK (beta > 0)")
