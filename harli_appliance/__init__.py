"""Harli: serve an LLM and finetune LoRA adapters of it on one machine, inside the latency you promised."""

__version__ = "0.1.0"
