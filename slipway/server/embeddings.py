"""Embeddings of texts, and the scores and ranks computed from them.

Classification would need a classification head. No supported model has one, so it is refused.

Not here: computation of hidden states (engine/), HTTP (app.py).
"""

import asyncio
import base64
import time
import uuid
from typing import Any, NoReturn

import numpy as np

from slipway.engine.params import SamplingParams
from slipway.engine.request import RequestSpec
from slipway.errors import EngineDead, InvalidRequest, Shown
from slipway.server import schema
from slipway.server.responses import token_usage
from slipway.server.service import Prompt, QueueSlot, Service


class EmbeddingHandler:
    """Handler of embedding, score, rerank and classify requests to one service."""

    def __init__(self, service: Service):
        self._service = service

    async def embeddings(self, body: schema.Embedding, slot: QueueSlot) -> dict[str, Any]:
        """Return OpenAI's list of embeddings."""
        prompts = await self._prompts(body)
        vectors = await self._hidden(slot, prompts, body.pooling, priority=body.priority)
        if body.dimensions is not None:
            if not 1 <= body.dimensions <= vectors.shape[1]:
                raise InvalidRequest("dimensions", body.dimensions, f"1 to {vectors.shape[1]}")
            # Kusupati et al., Matryoshka representation learning, 2022
            vectors = vectors[:, : body.dimensions]
        if body.normalize if body.use_activation is None else body.use_activation:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        def encoded(vector: np.ndarray) -> Any:
            if body.encoding_format == "base64":
                return base64.b64encode(vector.tobytes()).decode()
            return vector.tolist()

        data = [
            {"object": "embedding", "index": i, "embedding": encoded(vector)}
            for i, vector in enumerate(vectors)
        ]
        return {
            "object": "list",
            "model": self._service.model_name,
            "data": data,
            "usage": _usage(prompts),
        }

    async def _prompts(self, body: schema.Embedding) -> list[Prompt]:
        """Return the prompts of input, or of messages. Raises InvalidRequest."""
        given = body.input
        if (given is None) == (body.messages is None):
            raise InvalidRequest("input", body.input, "either input or messages")
        if body.messages is None:
            for field in (
                "add_generation_prompt",
                "continue_final_message",
                "chat_template_kwargs",
            ):
                if value := getattr(body, field):
                    raise InvalidRequest(field, value, "no value unless messages is given")
        else:
            conversation = await self._service.conversation(
                body.messages,
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
            )
            given = [conversation.token_ids]
        return await self._service.prompts(
            given,
            body.client_names()["prompt"],
            body.truncate_prompt_tokens,
            side=body.truncation_side,
        )

    async def score(self, body: schema.Score, slot: QueueSlot) -> dict[str, Any]:
        """Return vLLM's list of scores, for any of its names for the two sides."""
        (first, left), (second, right) = _sides(body)
        queries, documents = _texts(left, first), _texts(right, second)
        if len(queries) not in (1, len(documents)):
            expected = f"as many as {first} has ({len(queries)})"
            raise InvalidRequest(second, Shown(f"{len(documents)} texts"), expected)
        values, usage = await self._scores(
            slot, body, queries=(first, queries), documents=(second, documents)
        )
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
        """Return the list of results in Jina's and Cohere's format."""
        if body.top_n < 0:
            raise InvalidRequest("top_n", body.top_n, "at least 1, or 0 for all")
        query, documents = _texts(body.query, "query"), _texts(body.documents, "documents")
        values, usage = await self._scores(
            slot, body, queries=("query", query), documents=("documents", documents)
        )
        order = sorted(range(len(values)), key=lambda i: -values[i])[: body.top_n or None]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": values[i]} for i in order]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": documents[result["index"]]}
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": self._service.model_name,
            "results": results,
            "usage": usage,
        }

    async def classify(self, body: schema.Classify, _: QueueSlot) -> NoReturn:
        """Raise InvalidRequest: classification is not supported."""
        name = body.model or self._service.model_name
        expected = "a model with a classification head; this one generates text"
        raise InvalidRequest("model", name, expected)

    async def _scores(
        self,
        slot: QueueSlot,
        body: schema.Scoring,
        *,
        queries: tuple[str, list[str]],
        documents: tuple[str, list[str]],
    ) -> tuple[list[float], dict[str, int]]:
        """Return the cosine of each pair, and the usage.

        ``queries``, ``documents``: the name of the field and its texts.
        """
        if body.instruction is not None:
            expected = "no value: texts are scored without a template"
            raise InvalidRequest("instruction", body.instruction, expected)
        prompts = await self._side(*queries, "max_tokens_per_query", body=body)
        prompts += await self._side(*documents, "max_tokens_per_doc", body=body)
        limit = self._service.config.max_prompts
        if len(prompts) > limit:
            count = Shown(f"{len(prompts)} texts in total")
            raise InvalidRequest(documents[0], count, f"at most {limit}")
        vectors = await self._hidden(slot, prompts, body.pooling, priority=body.priority)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        num_queries = len(queries[1])
        values = (vectors[:num_queries] * vectors[num_queries:]).sum(axis=1).tolist()
        return values, _usage(prompts)

    async def _side(
        self, field: str, texts: list[str], limit_field: str, *, body: schema.Scoring
    ) -> list[Prompt]:
        """Return the prompts of one side, cut to the limit of the side and to that of both."""
        limit, keep = getattr(body, limit_field), body.truncate_prompt_tokens
        if limit < 0:
            raise InvalidRequest(limit_field, limit, "at least 1, or 0 for no limit")
        prompts = await self._service.prompts(texts, field, limit or None, side="right")
        if keep is None:
            return prompts
        ids = [prompt.token_ids for prompt in prompts]
        return await self._service.prompts(ids, field, keep, side=body.truncation_side)

    async def _hidden(
        self, slot: QueueSlot, prompts: list[Prompt], pooling: str, *, priority: int
    ) -> np.ndarray:
        """Return the pooled hidden states [prompts, embed] of prompts, not normalized."""

        async def hidden_of(prompt: Prompt) -> list[float]:
            params = SamplingParams(max_tokens=1)
            spec = RequestSpec(prompt.token_ids, params, priority=priority, pooling=pooling)
            with self._service.open(slot, spec) as stream:
                while not stream.finished:
                    last = (await stream.next())[-1]
            if last.hidden is None:
                raise EngineDead("the request was aborted")
            return last.hidden

        return np.array(await asyncio.gather(*map(hidden_of, prompts)), np.float32)


def _usage(prompts: list[Prompt]) -> dict[str, int]:
    return token_usage(sum(len(prompt.token_ids) for prompt in prompts))


def _sides(body: schema.Score) -> list[tuple[str, Any]]:
    """Return the two sides of a score as (field, value) pairs. Raises InvalidRequest."""
    names = dict.fromkeys(name for pair in schema.SCORE_PAIRS for name in pair)
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if tuple(given) not in schema.SCORE_PAIRS:
        pairs = "; ".join(" and ".join(pair) for pair in schema.SCORE_PAIRS)
        field = next(iter(given), "queries")
        found = Shown(", ".join(given) or "no field of a pair")
        raise InvalidRequest(field, found, f"exactly one of these pairs: {pairs}")
    return list(given.items())


def _texts(given: Any, field: str) -> list[str]:
    """Return one or many documents as texts. Raises InvalidRequest."""
    if not isinstance(given, list):
        return [_text(given, field)]
    if not given:
        raise InvalidRequest(field, given, "at least one text")
    return [_text(item, f"{field}[{number}]") for number, item in enumerate(given)]


def _text(item: Any, field: str) -> str:
    """Return the text of one document; text parts are joined by line ends."""
    if isinstance(item, str):
        return item
    if set(item) == {"content"}:
        parts = item["content"]
    else:
        parts = [item | {"type": item.get("type", "text")}]
    if not isinstance(parts, list) or not parts:
        parts = [None]
    for part in parts:
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if not is_text or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            expected = 'a text, {"text": ...}, or {"content": [text parts]}'
            raise InvalidRequest(field, item, expected)
    return "\n".join(part["text"] for part in parts)
