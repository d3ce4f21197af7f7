"""Whether a submitted job could ever run here; `JobRun` asks the same when it starts, exactly.

Knows jobs, data files and the model's shapes; does not know who holds slots now.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harli_appliance.api.ports import Job
from harli_appliance.errors import UsageError
from harli_appliance.memory.arena import Form
from harli_appliance.training.activations import Buffers
from harli_appliance.training.adapter_state import state_slots
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.dataset import read_examples
from harli_appliance.training.fit import fit, fitting_tokens
from harli_appliance.training.job_run import adapter_for
from harli_appliance.training.packing import encode, size_of
from harli_appliance.training.turns import ChatEncoder

TEMPLATE_BYTES = 256
"""More than a chat template adds to an example beyond what JSON's own keys and braces take."""


def refuse_unfit(
    job: Job, files: Sequence[Path], backbone: Backbone, encoder: ChatEncoder, buffers: Buffers, leasable: int
) -> None:
    """Raise unless the pool could hold the job's adapter and a micro-batch of its longest example.

    The files, the held-out one among them, are encoded only when a line has so many bytes that it might have too
    many tokens. A preference has its prompt twice, once before each answer.

    Raises:
        UsageError: it could not; carries the numbers.
    """
    adapter = adapter_for(job, backbone.twin())
    forms = [Form(tuple(parameter.shape), parameter.dtype) for parameter in adapter.parameters()]
    state = state_slots(forms, [*buffers[0], *buffers[1]])
    longest = 1
    sequences = 2 if job.method == "dpo" else 1
    most = sequences * (max(map(_longest_line, files)) + TEMPLATE_BYTES)
    if most > fitting_tokens(backbone, leasable - state):
        longest = max(size_of(encode(example, encoder)) for data in files for example in read_examples(data))
    need = fit(backbone, state, longest, leasable)
    if not need.fits:
        raise UsageError(need.refusal(), code="does_not_fit", param="training_file")


def _longest_line(path: Path) -> int:
    """Bytes of it."""
    with path.open("rb") as file:
        return max(map(len, file), default=0)
