"""Whether a submitted job could ever run here; `JobRun` asks the same when it starts, exactly.

Knows jobs, data files and the model's shapes; does not know who holds slots now.
"""

from __future__ import annotations

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
from harli_appliance.training.packing import ChatEncoder, encode_example

TEMPLATE_BYTES = 256
"""More than a chat template adds to an example beyond what JSON's own keys and braces take."""


def refuse_unfit(
    job: Job, data: Path, backbone: Backbone, encoder: ChatEncoder, buffers: Buffers, leasable: int
) -> None:
    """Raise unless the pool could hold the job's adapter and a micro-batch of its longest example.

    The file is encoded only when one of its lines has so many bytes that it might have too many tokens.

    Raises:
        UsageError: it could not; carries the numbers.
    """
    adapter = adapter_for(job, backbone.twin())
    forms = [Form(tuple(parameter.shape), parameter.dtype) for parameter in adapter.parameters()]
    state = state_slots(forms, [*buffers[0], *buffers[1]])
    longest = 1
    if _longest_line(data) + TEMPLATE_BYTES > fitting_tokens(backbone, leasable - state):
        longest = max(len(encode_example(example, encoder).tokens) for example in read_examples(data))
    need = fit(backbone, state, longest, leasable)
    if not need.fits:
        raise UsageError(need.refusal(), code="does_not_fit", param="training_file")


def _longest_line(path: Path) -> int:
    """Bytes of it."""
    with path.open("rb") as file:
        return max(map(len, file), default=0)
