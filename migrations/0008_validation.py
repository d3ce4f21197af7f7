"""A file of held-out examples for a job, and what it shows; jobs of before had none."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0012_validation(db: Database) -> None:
    db.execute("ALTER TABLE jobs ADD COLUMN validation_file TEXT")
    db.execute("ALTER TABLE jobs ADD COLUMN eval_steps INTEGER NOT NULL DEFAULT 10 CHECK (eval_steps > 0)")
    db.execute(
        "ALTER TABLE jobs ADD COLUMN early_stopping_patience INTEGER NOT NULL DEFAULT 0 "
        "CHECK (early_stopping_patience >= 0)"
    )
    db.execute("ALTER TABLE jobs ADD COLUMN valid_loss REAL")
    db.execute("ALTER TABLE jobs ADD COLUMN best_step INTEGER CHECK (best_step >= 0)")
    db.execute(
        """
        CREATE TRIGGER jobs_need_their_validation_file BEFORE INSERT ON jobs
        WHEN NEW.validation_file IS NOT NULL AND NOT EXISTS (SELECT 1 FROM files WHERE id = NEW.validation_file)
        BEGIN SELECT RAISE(ABORT, 'the validation file does not exist'); END
        """
    )
    db.execute(
        """
        CREATE TRIGGER validation_files_in_use BEFORE DELETE ON files
        WHEN EXISTS (SELECT 1 FROM jobs WHERE validation_file = OLD.id AND finished_at IS NULL)
        BEGIN SELECT RAISE(ABORT, 'the file is used by a job'); END
        """
    )
