"""Label answers proposed ahead, and checked by one pass of the model.

A structure of three labels takes five decoding steps, two of them for commas that nothing else
could follow, and each step reads every weight of the model. Here the engine core writes the rest of
an answer down as it is likely to go: ids that its grammar forces, and between them the labels that
came most often after the labels so far. One pass of the model checks all of it (speculative
decoding at temperature 0: an id is taken only where the model would have decoded it). A wrong guess
costs a few rows of that pass; answers and log-probabilities stay what they were.

The guesses are made where the grammar is, in the engine core's scheduler: vLLM's own proposers run
in the worker, which knows no grammar. The worker has one that proposes nothing (`NoProposer`), so
that it is prepared to check what the scheduler adds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output.backend_outlines import OutlinesGrammar

from patches.canonical import is_spelled

_MAX_PREFIXES = 4096


class NoProposer:
    """The worker's proposer: none of its own.

    Args:
        vllm_config: unused, part of vLLM's contract.
    """

    def __init__(self, vllm_config: Any) -> None:
        pass

    def propose(
        self, sampled_token_ids: Sequence[Sequence[int]], *args: Any, **kwargs: Any
    ) -> list[list[int]]:
        """No ids for each request of the batch."""
        return [[] for _ in sampled_token_ids]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to load."""


class AnswerBook:
    """What the answers so far went on with: per kind of answer and prefix, how often each id came.

    Args:
        max_prefixes: further ones push the longest unused out.
    """

    def __init__(self, max_prefixes: int = _MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._counts: OrderedDict[Hashable, Counter[int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def observe(self, kind: Hashable, answer: Sequence[int]) -> None:
        """One more answer of a kind, a structure under an adapter."""
        for end, token_id in enumerate(answer):
            key = (kind, tuple(answer[:end]))
            self._counts.setdefault(key, Counter())[token_id] += 1
            self._counts.move_to_end(key)
        while len(self._counts) > self._max_prefixes:
            self._counts.popitem(last=False)

    def likeliest(self, kind: Hashable, prefix: Sequence[int]) -> int | None:
        """The id that came most often after a prefix; None where none did."""
        found = self._counts.get((kind, tuple(prefix)))
        return found.most_common(1)[0][0] if found else None


def propose(
    grammar: OutlinesGrammar, book: AnswerBook, kind: Hashable, answer: Sequence[int], room: int
) -> list[int]:
    """How an answer may go on: forced ids, and between them the likeliest.

    Args:
        grammar: at the answer's end; it is there again afterwards.
        book: of earlier answers.
        kind: of this answer.
        answer: ids so far.
        room: most ids.
    """
    guide, proposed = grammar.guide, list[int]()
    while len(proposed) < room:
        allowed = guide.get_tokens()
        token_id = allowed[0] if len(allowed) == 1 else book.likeliest(kind, [*answer, *proposed])
        if token_id is None or token_id == grammar.eos_token_id or token_id not in allowed:
            break
        guide.advance(token_id, return_tokens=False)
        proposed.append(token_id)
    if proposed:
        guide.rollback_state(len(proposed))
    return proposed


class ProposingScheduler(Scheduler):
    """VLLM's scheduler, which lets label answers be checked several ids at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._book = AnswerBook()

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """After each step: what the next one is to check."""
        super().update_draft_token_ids(draft_token_ids)
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            kind = _kind(request)
            if kind is not None:
                answer = list(request.output_token_ids)
                room = min(self.num_spec_tokens, request.max_tokens - len(answer) - 1)
                grammar = request.structured_output_request.grammar
                request.spec_token_ids = propose(grammar, self._book, kind, answer, room)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        kind = _kind(request)
        if kind is not None:
            self._book.observe(kind, list(request.output_token_ids))
        return super()._free_request(request, *args, **kwargs)


def _kind(request: Any) -> Hashable | None:
    """What a request's answer is like others of: None unless it is a label decoded greedily."""
    asked, params = request.structured_output_request, request.sampling_params
    if asked is None or params is None or params.temperature != 0:
        return None
    if not isinstance(asked.grammar, OutlinesGrammar):
        return None
    pattern = asked.structured_output_key[1]
    lora = request.lora_request
    return (lora.lora_name if lora else None, pattern) if is_spelled(pattern) else None
