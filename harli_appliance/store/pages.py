"""Pages of a list that is newest first, with a cursor that is the last item already seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlite_utils import Database

from harli_appliance.errors import NotFound, UsageError
from harli_appliance.store.ids import bindable


def page(
    db: Database, table: str, limit: int, after: str | None, where: str = "1", values: Sequence[object] = ()
) -> tuple[list[dict[str, Any]], bool]:
    """Up to `limit` rows of a table that has ``seq`` and ``id``, and whether older ones are left.

    Args:
        table: one of ours; never text from outside.
        after: id of the last item already seen; None begins with the newest.
        where: a condition with placeholders for `values`.

    Raises:
        UsageError: `limit` is not positive.
        NotFound: no such item to go on after.
    """
    if limit < 1:
        raise UsageError(f"limit is {limit}; ask for at least 1", param="limit")
    values = list(values)
    if after is not None:
        cursor = next(db.table(table).rows_where(f"({where}) AND id = ?", [*values, bindable(after)]), None)
        if cursor is None:
            raise NotFound(f"no item '{after}' to go on after; begin without 'after'", param="after")
        where, values = f"({where}) AND seq < ?", [*values, cursor["seq"]]
    rows = list(db.table(table).rows_where(where, values, order_by="seq DESC", limit=limit + 1))
    return rows[:limit], len(rows) > limit
