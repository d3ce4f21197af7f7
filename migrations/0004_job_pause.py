"""Jobs can be paused, and one column says what a person asked of a running job: to pause or to cancel it.

SQLite cannot change a CHECK, so the table is built anew and its rows are copied. Foreign keys are not enforced
while migrations run, so that dropping the old table takes no events or adapters with it.
"""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")

KEPT = (
    "seq, id, status, model, training_file, created_at, seed, n_epochs, batch_size, learning_rate, "
    "lr_scheduler_type, warmup_ratio, max_grad_norm, lora_rank, lora_alpha, use_rslora, lora_dropout, suffix, "
    "metadata, started_at, finished_at, fine_tuned_model, step, total_steps, trained_tokens, loss, error_code, "
    "error_message"
)


@migrations()
def m0008_job_pause(db: Database) -> None:
    db.execute("DROP TRIGGER files_in_use")  # it names the table that goes away for a moment
    db.execute(
        """
        CREATE TABLE jobs_with_pause (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            status TEXT NOT NULL
                CHECK (status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')),
            model TEXT NOT NULL,
            training_file TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            seed INTEGER NOT NULL CHECK (seed >= 0),
            n_epochs INTEGER NOT NULL CHECK (n_epochs > 0),
            batch_size INTEGER NOT NULL CHECK (batch_size > 0),
            learning_rate REAL NOT NULL CHECK (learning_rate > 0),
            lr_scheduler_type TEXT NOT NULL DEFAULT 'cosine'
                CHECK (lr_scheduler_type IN ('cosine', 'linear', 'constant')),
            warmup_ratio REAL NOT NULL DEFAULT 0.1 CHECK (warmup_ratio >= 0 AND warmup_ratio <= 1),
            max_grad_norm REAL NOT NULL DEFAULT 1.0 CHECK (max_grad_norm >= 0),
            lora_rank INTEGER NOT NULL CHECK (lora_rank > 0),
            lora_alpha REAL NOT NULL CHECK (lora_alpha > 0),
            use_rslora INTEGER NOT NULL DEFAULT 0 CHECK (use_rslora IN (0, 1)),
            lora_dropout REAL NOT NULL DEFAULT 0 CHECK (lora_dropout >= 0 AND lora_dropout < 1),
            suffix TEXT,
            metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata)),
            started_at INTEGER,
            finished_at INTEGER,
            fine_tuned_model TEXT UNIQUE,
            step INTEGER NOT NULL DEFAULT 0 CHECK (step >= 0),
            total_steps INTEGER NOT NULL DEFAULT 0 CHECK (total_steps >= step),
            trained_tokens INTEGER NOT NULL DEFAULT 0 CHECK (trained_tokens >= 0),
            loss REAL,
            error_code TEXT,
            error_message TEXT,
            asked TEXT CHECK (asked IN ('pause', 'cancel')),
            CHECK (status != 'running' OR started_at IS NOT NULL),
            CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
            CHECK ((status = 'succeeded') = (fine_tuned_model IS NOT NULL)),
            CHECK ((status = 'failed') = (error_code IS NOT NULL)),
            CHECK (asked IS NULL OR status = 'running')
        )
        """
    )
    db.execute(
        f"INSERT INTO jobs_with_pause ({KEPT}, asked) SELECT {KEPT}, "  # noqa: S608 - constant names
        "CASE WHEN status = 'running' AND cancel_requested THEN 'cancel' END FROM jobs"
    )
    db.execute("DROP TABLE jobs")
    db.execute("ALTER TABLE jobs_with_pause RENAME TO jobs")
    db.execute("CREATE INDEX jobs_by_status ON jobs (status, seq)")
    db.execute(
        """
        CREATE TRIGGER jobs_start_queued BEFORE INSERT ON jobs
        WHEN NEW.status != 'queued'
        BEGIN SELECT RAISE(ABORT, 'a job starts as queued'); END
        """
    )
    db.execute(
        """
        CREATE TRIGGER jobs_need_their_file BEFORE INSERT ON jobs
        WHEN NOT EXISTS (SELECT 1 FROM files WHERE id = NEW.training_file)
        BEGIN SELECT RAISE(ABORT, 'the training file does not exist'); END
        """
    )
    db.execute(
        """
        CREATE TRIGGER jobs_move_legally BEFORE UPDATE OF status ON jobs
        WHEN NOT (
            NEW.status = OLD.status
            OR (OLD.status = 'queued' AND NEW.status IN ('running', 'paused', 'cancelled'))
            OR (OLD.status = 'running'
                AND NEW.status IN ('queued', 'paused', 'succeeded', 'failed', 'cancelled'))
            OR (OLD.status = 'paused' AND NEW.status IN ('queued', 'cancelled'))
        )
        BEGIN SELECT RAISE(ABORT, 'illegal change of job status'); END
        """
    )
    db.execute(
        """
        CREATE TRIGGER files_in_use BEFORE DELETE ON files
        WHEN EXISTS (
            SELECT 1 FROM jobs
            WHERE training_file = OLD.id AND status IN ('queued', 'running', 'paused')
        )
        BEGIN SELECT RAISE(ABORT, 'the file is used by a job'); END
        """
    )
