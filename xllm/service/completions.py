"""Decides what OpenAI's routes of generation ask for and look like; answer does it."""

from __future__ import annotations

import re

from xllm.service.beams import Searched
from xllm.service.body import ChatBody, CompletionBody
from xllm.service.errors import ApiError, renamed
from xllm.service.format import Format
from xllm.service.gate import Record
from xllm.service.openai import ChatFormat, CompletionFormat
from xllm.service.params import Job, chat_job, completion_job


class Completions(Searched):
    """POST /v1/completions."""

    body = CompletionBody
    kind = "completion"

    def job(self, data: bytes, entry: Record) -> Job:
        codec = self.service.codec
        return completion_job(self.parse(data, CompletionBody), self.service.facts, codec.encode, codec.decode)

    def format(self, job: Job) -> Format:
        echo = [text for text in job.echo or [""] * len(job.prompts) for _ in range(job.n)]
        return CompletionFormat(self.service.facts.name, self.service.codec, job.logprobs, job.include_usage, echo)


class OfChat(Searched):
    """A route that asks for a chat, in one form or another. names: patterns of the fields that a chat names otherwise
    than this API, and what they are called in it."""

    names: tuple[tuple[re.Pattern[str], str], ...] = ()

    def plan(self, data: bytes, entry: Record) -> Job:
        try:
            return super().plan(data, entry)
        except ApiError as error:
            raise renamed(error, self.names) from None

    def chat_job(self, body: ChatBody) -> Job:
        """Raises ApiError."""
        service = self.service
        return chat_job(body, service.facts, service.codec.encode, service.render, service.dialect)


class Chat(OfChat):
    """POST /v1/chat/completions."""

    body = ChatBody
    kind = "chat"

    def job(self, data: bytes, entry: Record) -> Job:
        return self.chat_job(self.parse(data, ChatBody))

    def format(self, job: Job) -> Format:
        tools = bool(job.reading.tools)
        return ChatFormat(self.service.facts.name, self.service.codec, job.logprobs, job.include_usage, tools)
