"""Files, finetuning jobs with their events, adapters, and what the latency predictor learned.

The checks and triggers say in SQL what the job state machine says in Python, so that no path around it
(a bug, a person with a shell) can leave a job in a state that does not exist.
"""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0001_files(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE files (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            filename TEXT NOT NULL,
            purpose TEXT NOT NULL CHECK (purpose = 'fine-tune'),
            bytes INTEGER NOT NULL CHECK (bytes > 0),
            examples INTEGER NOT NULL CHECK (examples > 0),
            created_at INTEGER NOT NULL
        )
        """
    )


@migrations()
def m0002_jobs(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
            model TEXT NOT NULL,
            training_file TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            seed INTEGER NOT NULL CHECK (seed >= 0),
            n_epochs INTEGER NOT NULL CHECK (n_epochs > 0),
            batch_size INTEGER NOT NULL CHECK (batch_size > 0),
            learning_rate REAL NOT NULL CHECK (learning_rate > 0),
            lora_rank INTEGER NOT NULL CHECK (lora_rank > 0),
            lora_alpha REAL NOT NULL CHECK (lora_alpha > 0),
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
            cancel_requested INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
            CHECK (status != 'running' OR started_at IS NOT NULL),
            CHECK ((status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
            CHECK ((status = 'succeeded') = (fine_tuned_model IS NOT NULL)),
            CHECK ((status = 'failed') = (error_code IS NOT NULL)),
            CHECK (cancel_requested = 0 OR status IN ('running', 'cancelled'))
        )
        """
    )
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
            OR (OLD.status = 'queued' AND NEW.status IN ('running', 'cancelled'))
            OR (OLD.status = 'running' AND NEW.status IN ('queued', 'succeeded', 'failed', 'cancelled'))
        )
        BEGIN SELECT RAISE(ABORT, 'illegal change of job status'); END
        """
    )
    # Not a foreign key: a finished job keeps naming its file after a person deleted it.
    db.execute(
        """
        CREATE TRIGGER files_in_use BEFORE DELETE ON files
        WHEN EXISTS (
            SELECT 1 FROM jobs WHERE training_file = OLD.id AND status IN ('queued', 'running')
        )
        BEGIN SELECT RAISE(ABORT, 'the file is used by a job'); END
        """
    )


@migrations()
def m0003_job_events(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE job_events (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            id TEXT NOT NULL UNIQUE,
            job_id TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
            created_at INTEGER NOT NULL,
            level TEXT NOT NULL CHECK (level IN ('info', 'warn', 'error')),
            message TEXT NOT NULL,
            data TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(data))
        )
        """
    )
    db.execute("CREATE INDEX job_events_by_job ON job_events (job_id, seq)")


@migrations()
def m0004_adapters(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE adapters (
            name TEXT PRIMARY KEY NOT NULL,
            job_id TEXT NOT NULL UNIQUE REFERENCES jobs (id),
            path TEXT NOT NULL,
            rank INTEGER NOT NULL CHECK (rank > 0),
            created_at INTEGER NOT NULL
        )
        """
    )


@migrations()
def m0005_predictor(db: Database) -> None:
    db.execute(
        """
        CREATE TABLE predictor (
            device TEXT NOT NULL,
            model TEXT NOT NULL,
            version TEXT NOT NULL,
            data TEXT NOT NULL CHECK (json_valid(data)),
            updated_at INTEGER NOT NULL,
            PRIMARY KEY (device, model, version)
        )
        """
    )
