"""Decides how well two texts fit, and what /v1/rerank, /v1/score and /v1/classify answer. An embedding model gives the
cosine of both texts' embeddings; a classifier reads both as one prompt and gives a probability: of its one label, or of
the label that is called yes."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from xllm.service.body import ClassifyBody, RerankBody, RowsBody, ScoreBody
from xllm.service.errors import invalid
from xllm.service.gate import Record
from xllm.service.params import listed
from xllm.service.rows import RowsEndpoint, RowsJob, Text, Tokens, check_count, length
from xllm.service.sampling import ModelFacts, within

if TYPE_CHECKING:
    import numpy as np

    from xllm.service.rows import Rows

MAX_PAIR_CHARS = 1 << 25  # of all pairs, in which a text that goes with many is read as often

Pair = tuple[Text, Text]
Prompts = tuple[tuple[int, ...], ...]


class Relevance(RowsEndpoint):
    """A route whose answer is made of the scores of pairs."""

    tasks = ("embed", "classify")

    def job(
        self, body: RowsBody, pairs: Sequence[Pair], answer: Callable[[Sequence[float]], dict[str, Any]]
    ) -> RowsJob:
        """What to compute for `pairs`, whose scores `answer` gets, 0 to 1 or a cosine. Raises ApiError."""
        if sum(len(first.text) + len(second.text) for first, second in pairs) > MAX_PAIR_CHARS:
            text = f"the pairs of texts have more than {MAX_PAIR_CHARS} characters together: ask for them in parts"
            raise invalid("invalid_request", text, pairs[0][1].path)
        facts, tokens = self.service.facts, Tokens(self.service.facts, self.service.codec, body)
        if facts.task == "embed":
            prompts, scores = _cosines(pairs, tokens)
        else:
            at = _column(facts)
            prompts = tuple(tokens.of_pair(first, second) for first, second in pairs)
            scores = lambda rows: [_probabilities(row)[at] for row in rows]  # noqa: E731
        return RowsJob(prompts, lambda rows: answer(scores(rows)))


class Rerank(Relevance):
    """POST /v1/rerank."""

    body = RerankBody
    kind = "rerank"

    def plan(self, data: bytes, entry: Record) -> RowsJob:
        body = self.parse(data, RerankBody)
        check_count(body.documents, "documents")
        within("top_n", body.top_n, 1, math.inf)
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        query = Text(body.query, "query")
        pairs = [(query, Text(text, f"documents[{at}]")) for at, text in enumerate(texts)]

        def answer(scores: Sequence[float]) -> dict[str, Any]:
            best = sorted(range(len(texts)), key=lambda at: (-scores[at], at))[: body.top_n]
            results: list[dict[str, Any]] = [{"index": at, "relevance_score": scores[at]} for at in best]
            if body.return_documents is not False:
                results = [each | {"document": {"text": texts[each["index"]]}} for each in results]
            return {"id": f"rerank-{uuid.uuid4().hex}", "results": results}

        return self.job(body, pairs, answer)


class Score(Relevance):
    """POST /v1/score."""

    body = ScoreBody
    kind = "score"

    def plan(self, data: bytes, entry: Record) -> RowsJob:
        body = self.parse(data, ScoreBody)
        first, second = _texts(body.text_1, "text_1"), _texts(body.text_2, "text_2")
        if len(first) not in (1, len(second)):
            text = f"text_1 has {len(first)} texts and text_2 has {len(second)}: give one text_1, or as many of both"
            raise invalid("invalid_request", text, "text_1")
        first = first * len(second) if len(first) == 1 else first

        def answer(scores: Sequence[float]) -> dict[str, Any]:
            data = [{"index": at, "object": "score", "score": score} for at, score in enumerate(scores)]
            return _envelope("score") | {"data": data}

        return self.job(body, list(zip(first, second, strict=True)), answer)


class Classify(RowsEndpoint):
    """POST /v1/classify."""

    body = ClassifyBody
    kind = "classify"
    tasks = ("classify",)

    def plan(self, data: bytes, entry: Record) -> RowsJob:
        body, labels = self.parse(data, ClassifyBody), self.service.facts.labels
        given = listed(body.input, "input")
        check_count(given, "input")
        tokens = Tokens(self.service.facts, self.service.codec, body, body.add_special_tokens is not False)
        prompts = tuple(tokens.of(each, f"input[{at}]") for at, each in enumerate(given))

        def of(row: np.ndarray) -> dict[str, Any]:
            found = _probabilities(row)
            return {"label": labels[found.index(max(found))], "probs": found, "num_classes": len(found)}

        def answer(rows: Rows) -> dict[str, Any]:
            return _envelope("classify") | {"data": [{"index": at} | of(row) for at, row in enumerate(rows)]}

        return RowsJob(prompts, answer)


def _texts(given: str | list[str], name: str) -> list[Text]:
    if isinstance(given, str):
        return [Text(given, name)]
    check_count(given, name)
    return [Text(text, f"{name}[{at}]") for at, text in enumerate(given)]


def _envelope(kind: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}


def _column(facts: ModelFacts) -> int:
    """Which label's probability says how well two texts fit."""
    if len(facts.labels) == 1:
        return 0
    named = [label.casefold() for label in facts.labels]
    if named.count("yes") == 1:
        return named.index("yes")
    shown = ", ".join(facts.labels[:8])
    text = f"{facts.name} has {len(facts.labels)} labels ({shown}): a score of two texts needs one, or one called yes"
    raise invalid("wrong_task", f"{text}; try /v1/classify")


def _cosines(pairs: Sequence[Pair], tokens: Tokens) -> tuple[Prompts, Callable[[Rows], list[float]]]:
    """Each text once, however many pairs it is in."""
    prompts: dict[str, tuple[int, ...]] = {}
    for text, path in (text for pair in pairs for text in pair):
        if text not in prompts:
            prompts[text] = tokens.of(text, path)
    at = {text: index for index, text in enumerate(prompts)}
    wanted = [(at[first.text], at[second.text]) for first, second in pairs]
    return tuple(prompts.values()), lambda rows: [_cosine(rows[one], rows[other]) for one, other in wanted]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """0 where a row has no direction."""
    one, other = one.astype("f8"), other.astype("f8")
    lengths = length(one) * length(other)
    return float((one * other).sum()) / lengths if lengths else 0.0


def _probabilities(row: np.ndarray) -> list[float]:
    """Of each label: a logistic curve for one, softmax for several."""
    logits = row.tolist()
    top = max(*logits, 0.0) if len(logits) == 1 else max(logits)
    parts = [math.exp(logit - top) for logit in logits]
    whole = math.fsum(parts) + (math.exp(-top) if len(logits) == 1 else 0.0)
    return [part / whole for part in parts]
