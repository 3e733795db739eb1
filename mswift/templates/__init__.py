"""Conversations to token ids and per-token weights, by the checkpoint's own chat template."""

from __future__ import annotations

from mswift.templates.chat import ChatTemplate, Encoded, LossScale, Message

__all__ = ["ChatTemplate", "Encoded", "LossScale", "Message"]
