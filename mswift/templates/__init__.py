"""Conversations to token ids and per-token weights, by the checkpoint's own chat template or one given by name."""

from __future__ import annotations

from mswift.templates.chat import ChatTemplate
from mswift.templates.conversation import Conversation, Encoded, EncodedChunk, Message, RowEncoder, Tool
from mswift.templates.loss_scale import LossScale, parse_loss_scale
from mswift.templates.plain import PlainText

__all__ = ["ChatTemplate", "Conversation", "Encoded", "EncodedChunk", "LossScale", "Message", "PlainText", "RowEncoder", "Tool", "parse_loss_scale"]
