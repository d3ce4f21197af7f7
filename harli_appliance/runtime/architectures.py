"""Whether SGLang has a model of an architecture. Knows SGLang's registry of models and nothing else of it."""

from __future__ import annotations

from harli_appliance.errors import ConfigError
from harli_appliance.runtime import cpu_stand_ins


def refuse_unservable(architecture: str) -> None:
    """Ask SGLang's registry, which takes seconds to import: for architectures that nothing else vouches for.

    Models whose kernels this machine lacks are not in it, and neither is SGLang's way of wrapping any transformers
    model, which has not been proven here.

    Raises:
        ConfigError: there is no such model.
    """
    cpu_stand_ins.install()
    from sglang.srt.models.registry import ModelRegistry

    if not ModelRegistry.is_arch_supported(architecture):
        raise ConfigError(
            f"{architecture}: the installed SGLang has no model of this architecture that runs on this machine; "
            "use another model",
            param="model",
        )
