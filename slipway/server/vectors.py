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
from slipway.errors import EngineDead, InvalidRequest
from slipway.server import schema
from slipway.server.service import Place, Prompt, Service


class Vectors:
    """Of one service's model."""

    def __init__(self, service: Service):
        self._service = service

    async def embeddings(self, body: schema.Embedding, place: Place) -> dict[str, Any]:
        """OpenAI's list of embeddings."""
        prompts = await self._service.prompts(body.input, "input", body.truncate_prompt_tokens)
        vectors = await self._hidden(place, prompts, body.pooling, body.priority)
        if body.dimensions is not None:
            if not 1 <= body.dimensions <= vectors.shape[1]:
                raise InvalidRequest("dimensions", body.dimensions, f"1 to {vectors.shape[1]}")
            vectors = vectors[:, : body.dimensions]  # Kusupati et al., Matryoshka representation learning, 2022
        if body.normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        usage = sum(len(prompt.token_ids) for prompt in prompts)

        def shown(vector: np.ndarray) -> Any:
            return base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()

        data = [{"object": "embedding", "index": i, "embedding": shown(vector)} for i, vector in enumerate(vectors)]
        return {
            "object": "list", "model": self._service.model_name, "data": data,
            "usage": {"prompt_tokens": usage, "total_tokens": usage},
        }  # fmt: skip

    async def score(self, body: schema.Score, place: Place) -> dict[str, Any]:
        """vLLM's list of scores."""
        ours, theirs = ([given] if isinstance(given, str) else given for given in (body.text_1, body.text_2))
        if len(ours) not in (1, len(theirs)):
            raise InvalidRequest("text_2", f"{len(theirs)} texts", f"as many as text_1 has ({len(ours)})")
        values, usage = await self._scores(place, ours, theirs, body.pooling, body.priority)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(values)]
        return {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()),
                "model": self._service.model_name, "data": data, "usage": usage}  # fmt: skip

    async def rerank(self, body: schema.Rerank, place: Place) -> dict[str, Any]:
        """Jina's and Cohere's list of results."""
        if not body.documents:
            raise InvalidRequest("documents", [], "at least one")
        if body.top_n is not None and body.top_n < 1:
            raise InvalidRequest("top_n", body.top_n, "at least 1")
        values, usage = await self._scores(place, [body.query], body.documents, body.pooling, body.priority)
        order = sorted(range(len(values)), key=lambda i: -values[i])[: body.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": values[i]} for i in order]
        if body.return_documents:
            results = [each | {"document": {"text": body.documents[each["index"]]}} for each in results]
        name = f"rerank-{uuid.uuid4().hex}"
        return {"id": name, "model": self._service.model_name, "results": results, "usage": usage}

    async def classify(self, body: schema.Classify, _: Place) -> NoReturn:
        """Refused: these models generate. Raises InvalidRequest."""
        name = body.model or self._service.model_name
        raise InvalidRequest("model", name, "a model with a classification head; this one generates text")

    async def _scores(
        self, place: Place, ours: list[str], theirs: list[str], pooling: str, priority: int
    ) -> tuple[list[float], dict[str, int]]:
        prompts = await self._service.prompts([*ours, *theirs], "text_1", None)
        vectors = await self._hidden(place, prompts, pooling, priority)
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        usage = sum(len(prompt.token_ids) for prompt in prompts)
        values = (vectors[: len(ours)] * vectors[len(ours) :]).sum(axis=1).tolist()
        return values, {"prompt_tokens": usage, "total_tokens": usage}

    async def _hidden(self, place: Place, prompts: list[Prompt], pooling: str, priority: int) -> np.ndarray:
        """Hidden states [prompts, embed] of prompts, not normalized."""

        async def one(prompt: Prompt) -> list[float]:
            params = SamplingParams(max_tokens=1)
            with self._service.open(place, prompt, params, priority=priority, pooling=pooling) as stream:
                while not stream.finished:
                    last = (await stream.next())[-1]
            if last.hidden is None:
                raise EngineDead("the request was aborted")
            return last.hidden

        return np.array(await asyncio.gather(*map(one, prompts)), np.float32)
