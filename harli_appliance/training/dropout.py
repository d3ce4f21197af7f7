"""Dropout whose masks are a function of where a token stands, not of when or in what company it is computed.

A counter-based generator: each mask bit is a hash of (key, token, module, feature), so a window that is computed
again, or cut elsewhere, drops the same features. The hash is MurmurHash3's 32-bit finaliser (Appleby, public
domain), in int32 arithmetic that wraps alike on every device.

Knows tokens and features; does not know adapters or layers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_COLUMN = -1640531527  # 2**32 / golden ratio, odd, as int32
_ROW = 1013904243


class DropoutStream:
    """What the modules of one adapter draw from; `rows` is None while nothing is dropped."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None


def sequence_key(seed: int, step: int, index: int) -> int:
    """Key of a packed sequence of a job's step: the same however often that step is computed."""
    digest = hashlib.blake2s(f"{seed}:{step}:{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def token_keys(key: int, start: int, stop: int, device: torch.device | None = None) -> Tensor:
    """Keys of tokens [start, stop), int32 of shape [stop - start].

    Args:
        key: of the sequence that the tokens stand in, any integer.
    """
    tokens = torch.arange(start, stop, dtype=torch.int32, device=device)
    return _mixed(tokens * _ROW + _int32(key))


class TokenDropout(nn.Module):
    """Takes the place of `nn.Dropout` in one PEFT layer; [1, n, features] to the same, n as in `stream.rows`.

    Args:
        p: share of features that are dropped, in (0, 1).
        salt: number of the module, so that no two modules drop alike.
    """

    def __init__(self, p: float, salt: int, stream: DropoutStream) -> None:
        super().__init__()
        self.p = p
        self._salt = _int32(salt * 2654435761)
        self._stream = stream

    def forward(self, x: Tensor) -> Tensor:
        rows = self._stream.rows
        if rows is None:
            return x
        features = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _COLUMN
        drawn = _mixed(_mixed(rows + self._salt)[:, None] + features)
        kept = drawn >= round(self.p * 2**32) - 2**31
        return x * (kept.to(x.dtype) / (1 - self.p))


def _mixed(x: Tensor) -> Tensor:
    """Each bit of the result depends on each of `x`; int32, the shifts are made logical by the masks."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _int32(0x85EBCA6B)
    x = (x ^ (x >> 13 & 0x7FFFF)) * _int32(0xC2B2AE35)
    return x ^ (x >> 16 & 0xFFFF)


def _int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31
