"""Which job a person means: by id, by the beginning or end of it, by its adapter, or the last one.

Knows the list of jobs. Does not know what is done with the job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harli_appliance.client import HarliClient

FULL = len("ftjob-") + 24
LAST = "last"
PAGE = 100


async def find_job(client: HarliClient, told: str) -> str:
    """The id of the job that `told` names.

    Raises:
        UsageError: it could be several.
        NotFound: there is none.
    """
    from harli_appliance.errors import NotFound, UsageError

    if told.startswith("ftjob-") and len(told) == FULL:
        return told
    part = told.removeprefix("ftjob-").lstrip("…")  # as the dashboard shortens ids
    found: list[str] = []
    after = None
    while True:
        page = await client.jobs(PAGE, after)
        for job in page.data:
            if told in (LAST, job.id, job.fine_tuned_model):
                return job.id
            number = job.id.removeprefix("ftjob-")
            if part and (number.startswith(part) or number.endswith(part)):
                found.append(job.id)
        if not page.has_more or not page.data:
            break
        after = page.data[-1].id
    if len(found) > 1:
        some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UsageError(f"'{told}' could be {len(found)} jobs: {some}; write more of the id", param="job")
    if not found:
        raise NotFound(f"no job '{told}'; 'harli jobs list' shows their ids", code="job_not_found")
    return found[0]
