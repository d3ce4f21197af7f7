"""How a job adapts the model, and which projections; jobs and adapters of before were LoRA on all of them."""

from sqlite_utils import Database, Migrations

migrations = Migrations("harli")


@migrations()
def m0010_peft_methods(db: Database) -> None:
    db.execute(
        "ALTER TABLE jobs ADD COLUMN peft_method TEXT NOT NULL DEFAULT 'lora' "
        "CHECK (peft_method IN ('lora', 'dora', 'ia3'))"
    )
    db.execute(
        "ALTER TABLE jobs ADD COLUMN target_modules TEXT NOT NULL DEFAULT "
        """'["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]' """
        "CHECK (json_valid(target_modules))"
    )
    db.execute(
        "ALTER TABLE adapters ADD COLUMN download_only INTEGER NOT NULL DEFAULT 0 CHECK (download_only IN (0, 1))"
    )
