"""Answers that are numbers of whole texts: embeddings, and what is computed of them; knows no HTTP.

A class's probability would need a head of its own, which no model here has: who asks for one is refused.
"""

import asyncio
import base64
import time
import uuid
from typing import Any, NoReturn

import numpy as np

from slipway.engine.params import SamplingParams
from slipway.errors import EngineDead, InvalidRequest, Shown
from slipway.server import schema
from slipway.server.service import Prompt, QueueSlot, Service

SIDES = (
    ("queries", "documents"),
    ("queries", "items"),
    ("data_1", "data_2"),
    ("text_1", "text_2"),
)  # vLLM's names


class EmbeddingHandler:
    """Of one service's model."""

    def __init__(self, service: Service):
        self._service = service

    async def embeddings(self, body: schema.Embedding, slot: QueueSlot) -> dict[str, Any]:
        """OpenAI's list of embeddings."""
        cut, given = (body.truncate_prompt_tokens, body.truncation_side), body.input
        if (given is None) == (body.messages is None):
            raise InvalidRequest("input", body.input, "either input or messages")
        if body.messages is None:
            for field in (
                "add_generation_prompt",
                "continue_final_message",
                "chat_template_kwargs",
            ):
                if value := getattr(body, field):
                    raise InvalidRequest(field, value, "messages beside it, not input")
        else:
            conversation = await self._service.conversation(
                body.messages,
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            given = [conversation.token_ids]
        prompts = await self._service.prompts(given, body.names()["prompt"], *cut)
        vectors = await self._hidden(slot, prompts, body.pooling, body.priority)
        if body.dimensions is not None:
            if not 1 <= body.dimensions <= vectors.shape[1]:
                raise InvalidRequest("dimensions", body.dimensions, f"1 to {vectors.shape[1]}")
            vectors = vectors[
                :, : body.dimensions
            ]  # Kusupati et al., Matryoshka representation learning, 2022
        if body.normalize if body.use_activation is None else body.use_activation:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        usage = sum(len(prompt.token_ids) for prompt in prompts)

        def shown(vector: np.ndarray) -> Any:
            return (
                base64.b64encode(vector.tobytes()).decode()
                if body.encoding_format == "base64"
                else vector.tolist()
            )

        data = [
            {"object": "embedding", "index": i, "embedding": shown(vector)}
            for i, vector in enumerate(vectors)
        ]
        return {
            "object": "list",
            "model": self._service.model_name,
            "data": data,
            "usage": {"prompt_tokens": usage, "total_tokens": usage},
        }

    async def score(self, body: schema.Score, slot: QueueSlot) -> dict[str, Any]:
        """vLLM's list of scores, for any of its names of the two sides."""
        (first, left), (second, right) = _sides(body)
        ours, theirs = _texts(left, first), _texts(right, second)
        if len(ours) not in (1, len(theirs)):
            raise InvalidRequest(
                second, f"{len(theirs)} texts", f"as many as {first} has ({len(ours)})"
            )
        values, usage = await self._scores(slot, body, (first, ours), (second, theirs))
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
        return {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._service.model_name,
            "data": data,
            "usage": usage,
        }

    async def rerank(self, body: schema.Rerank, slot: QueueSlot) -> dict[str, Any]:
        """Jina's and Cohere's list of results."""
        if body.top_n < 0:
            raise InvalidRequest("top_n", body.top_n, "at least 1, or 0 for all")
        query, documents = _texts(body.query, "query"), _texts(body.documents, "documents")
        values, usage = await self._scores(slot, body, ("query", query), ("documents", documents))
        order = sorted(range(len(values)), key=lambda i: -values[i])[: body.top_n or None]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": values[i]} for i in order]
        if body.return_documents:
            results = [each | {"document": {"text": documents[each["index"]]}} for each in results]
        name = f"rerank-{uuid.uuid4().hex}"
        return {"id": name, "model": self._service.model_name, "results": results, "usage": usage}

    async def classify(self, body: schema.Classify, _: QueueSlot) -> NoReturn:
        """Refused: these models generate. Raises InvalidRequest."""
        name = body.model or self._service.model_name
        raise InvalidRequest(
            "model", name, "a model with a classification head; this one generates text"
        )

    async def _scores(
        self,
        slot: QueueSlot,
        body: schema.Scoring,
        ours: tuple[str, list[str]],
        theirs: tuple[str, list[str]],
    ) -> tuple[list[float], dict[str, int]]:
        """Return the cosine of each pair, and the usage; a side is the name of its field and its texts."""
        if body.instruction is not None:
            raise InvalidRequest(
                "instruction", body.instruction, "none: texts are scored without a template"
            )
        prompts = await self._side(*ours, "max_tokens_per_query", body)
        prompts += await self._side(*theirs, "max_tokens_per_doc", body)
        most = self._service.config.max_prompts
        if len(prompts) > most:
            raise InvalidRequest(theirs[0], f"{len(prompts)} texts in all", f"at most {most}")
        vectors = await self._hidden(slot, prompts, body.pooling, body.priority)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        usage = sum(len(prompt.token_ids) for prompt in prompts)
        values = (vectors[: len(ours[1])] * vectors[len(ours[1]) :]).sum(axis=1).tolist()
        return values, {"prompt_tokens": usage, "total_tokens": usage}

    async def _side(
        self, field: str, texts: list[str], limit_field: str, body: schema.Scoring
    ) -> list[Prompt]:
        """Return the prompts of one side, each cut to its own limit and to that of all."""
        limit, cut = getattr(body, limit_field), body.truncate_prompt_tokens
        if limit < 0:
            raise InvalidRequest(limit_field, limit, "at least 1, or 0 for no limit")
        prompts = await self._service.prompts(texts, field, limit or None, "right")
        if cut is None:
            return prompts
        return await self._service.prompts(
            [each.token_ids for each in prompts], field, cut, body.truncation_side
        )

    async def _hidden(
        self, slot: QueueSlot, prompts: list[Prompt], pooling: str, priority: int
    ) -> np.ndarray:
        """Hidden states [prompts, embed] of prompts, not normalized."""

        async def one(prompt: Prompt) -> list[float]:
            params = SamplingParams(max_tokens=1)
            with self._service.open(
                slot, prompt, params, priority=priority, pooling=pooling
            ) as stream:
                while not stream.finished:
                    last = (await stream.next())[-1]
            if last.hidden is None:
                raise EngineDead("the request was aborted")
            return last.hidden

        return np.array(await asyncio.gather(*map(one, prompts)), np.float32)


def _sides(body: schema.Score) -> list[tuple[str, Any]]:
    """Return the two sides of a score as (field, value): the names that the request uses. Raises InvalidRequest."""
    names = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if tuple(given) not in SIDES:
        expected = "one of these pairs: " + "; ".join(" and ".join(pair) for pair in SIDES)
        raise InvalidRequest(
            next(iter(given), "queries"), Shown(", ".join(given) or "nothing"), expected
        )
    return list(given.items())


def _texts(given: Any, field: str) -> list[str]:
    """Return one or many documents as texts. Raises InvalidRequest."""
    items = given if isinstance(given, list) else [given]
    if not items:
        raise InvalidRequest(field, items, "at least one text")
    return [
        _text(item, f"{field}[{number}]" if given is items else field)
        for number, item in enumerate(items)
    ]


def _text(item: Any, field: str) -> str:
    if isinstance(item, str):
        return item
    parts = (
        item.get("content")
        if set(item) == {"content"}
        else [item | {"type": item.get("type", "text")}]
    )
    if not isinstance(parts, list) or not parts:
        parts = [None]
    for part in parts:
        fine = (
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        )
        if not fine or part.keys() - {"type", "text"}:
            raise InvalidRequest(field, item, 'a text, {"text": ...}, or {"content": [text parts]}')
    return "\n".join(part["text"] for part in parts)
