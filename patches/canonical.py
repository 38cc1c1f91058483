"""Decoding that admits exact token sequences, through vLLM's Outlines backend.

An ordinary pattern admits every tokenization that spells a label; training saw one. So a token id
is written as one private-use character, a structure becomes an ordinary regular expression over
these characters, and Outlines compiles it against a vocabulary in which each such character is
one token. The pattern travels as a plain `structured_outputs.regex`.

The API process spells (`spell`), the engine core recognises and compiles (`install`): both use
`FIRST_CHARACTER`, and nothing else crosses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import outlines_core as oc

from patches.index_cache import IndexCache

FIRST_CHARACTER = 0xF0000
"""Token id 0; planes 15 and 16 of Unicode are private use and hold 131,072 ids."""
_LAST_CHARACTER = 0x10FFFF
_OPERATORS = frozenset("()|?:")


def spell(token_ids: Iterable[int]) -> str:
    """Token ids as private-use characters, one each.

    Raises:
        ValueError: the id does not fit (vocabularies of over 131,072 tokens).
    """
    return "".join(_character(token_id) for token_id in token_ids)


def _character(token_id: int) -> str:
    code = FIRST_CHARACTER + token_id
    if not FIRST_CHARACTER <= code <= _LAST_CHARACTER:
        raise ValueError(f"token id {token_id} has no private-use character")
    return chr(code)


def is_spelled(pattern: str) -> bool:
    """Whether a pattern was made of `spell`'s characters and groups alone."""
    letters = set(pattern) - _OPERATORS
    return bool(letters) and all(ord(letter) >= FIRST_CHARACTER for letter in letters)


_INDEXES = IndexCache(max_entries=1024, max_bytes=64 * 2**20)


def compile_index(pattern: str, eos_token_id: int) -> oc.Index:
    """An Outlines index over the token ids that a spelled pattern names; known ones are kept."""

    def build() -> oc.Index:
        letters = sorted(set(pattern) - _OPERATORS)
        vocabulary = oc.Vocabulary(
            eos_token_id, {letter: [ord(letter) - FIRST_CHARACTER] for letter in letters}
        )
        return oc.Index(pattern, vocabulary)

    return _INDEXES.get(f"{eos_token_id} {pattern}", build)


def is_known(pattern: str, eos_token_id: int) -> bool:
    """Whether a spelled pattern is compiled already, so that it takes no time."""
    return f"{eos_token_id} {pattern}" in _INDEXES


def install() -> None:
    """Lets vLLM's Outlines backend compile spelled patterns; other patterns go its own way.

    Raises:
        RuntimeError: upstream moved what this relies on.
    """
    from vllm.v1.structured_output import backend_outlines
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions

    backend: Any = backend_outlines.OutlinesBackend
    upstream = backend.compile_grammar
    if getattr(upstream, "_sieve_canonical", False):
        return
    fields = set(backend_outlines.OutlinesGrammar.__dataclass_fields__)
    if not {"vocab_size", "eos_token_id", "guide"} <= fields:
        raise RuntimeError(
            f"vLLM's OutlinesGrammar has fields {fields}; adapt patches/canonical.py"
        )

    @functools.wraps(upstream)
    def compile_grammar(
        self: Any, request_type: Any, grammar_spec: str, *args: Any, **kwargs: Any
    ) -> Any:
        if request_type != StructuredOutputOptions.REGEX or not is_spelled(grammar_spec):
            return upstream(self, request_type, grammar_spec, *args, **kwargs)
        eos_token_id = self.vocabulary.inner.get_eos_token_id()
        speculation = self.vllm_config.speculative_config
        max_rollback = speculation.num_speculative_tokens if speculation is not None else 0
        return backend_outlines.OutlinesGrammar(
            vocab_size=self.vocab_size,
            eos_token_id=eos_token_id,
            guide=oc.Guide(compile_index(grammar_spec, eos_token_id), max_rollback=max_rollback),
        )

    compile_grammar._sieve_canonical = True  # type: ignore[attr-defined]
    backend.compile_grammar = compile_grammar
