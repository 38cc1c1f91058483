"""Compiled indexes stay within their bytes and number, whatever is asked for and by how many."""

import threading
from types import SimpleNamespace

import outlines_core as oc
import pytest
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import StructuredOutputOptions

from patches import canonical, repairs
from patches.index_cache import IndexCache

LETTERS = oc.Vocabulary(0, {letter: [1 + i] for i, letter in enumerate("abcdefgh")})


def compiled(pattern):
    return lambda: oc.Index(pattern, LETTERS)


def test_ten_thousand_different_grammars_stay_within_the_bytes():
    cache = IndexCache(max_entries=100_000, max_bytes=200_000)
    for number in range(10_000):
        pattern = "".join("abcdefgh"[int(digit)] for digit in f"{number:o}")
        cache.get(pattern, compiled(pattern))
        assert cache.num_bytes <= 200_000
    assert 10 < len(cache) < 10_000


def test_entries_are_bounded_and_the_longest_unused_goes_first():
    cache = IndexCache(max_entries=2, max_bytes=10**9)
    first = cache.get("a", compiled("a"))
    cache.get("b", compiled("b"))
    assert cache.get("a", pytest.fail) is first
    cache.get("c", compiled("c"))
    assert "a" in cache
    assert "b" not in cache


def test_what_is_larger_than_the_cache_is_answered_and_not_kept():
    cache = IndexCache(max_entries=2, max_bytes=200)
    cache.get("a", compiled("a"))
    assert cache.get("big", compiled("[a-h]{1,100}")) is not None
    assert "big" not in cache
    assert "a" in cache


def test_an_error_is_passed_on_and_not_kept():
    cache = IndexCache(max_entries=2, max_bytes=10**9)
    with pytest.raises(ValueError, match="Failed to build"):
        cache.get("(", compiled("("))
    assert len(cache) == 0
    assert cache.num_bytes == 0


def test_threads_that_ask_at_once_all_get_their_own_grammar():
    cache, wrong = IndexCache(max_entries=3, max_bytes=10**9), []

    def ask(letter, token):
        for _ in range(300):
            index = cache.get(letter, compiled(letter))
            if index.get_allowed_tokens(index.get_initial_state()) != [token]:
                wrong.append(letter)

    threads = [
        threading.Thread(target=ask, args=(letter, 1 + i)) for i, letter in enumerate("abcdefgh")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 3


def backend():
    """VLLM's backend without an engine: only what compiling reads."""
    repairs.bounded_grammars()
    made = object.__new__(OutlinesBackend)
    made.vocabulary = SimpleNamespace(inner=LETTERS, _hash=1)
    made.vllm_config = SimpleNamespace(speculative_config=None)
    made.vocab_size = 9
    return made


def test_vllm_compiles_through_the_bounded_cache_with_the_same_result():
    grammar = backend().compile_grammar(StructuredOutputOptions.REGEX, "a(b|c)")
    assert grammar.validate_tokens([1, 2, 5]) == [1, 2]
    assert grammar.validate_tokens([1, 3]) == [1, 3]


def test_a_grammar_that_fails_raises_to_its_own_request():
    with pytest.raises(ValueError, match="missing tokens"):
        backend().compile_grammar(StructuredOutputOptions.REGEX, "z")
    assert backend().compile_grammar(StructuredOutputOptions.REGEX, "a") is not None


def test_a_label_does_not_queue_behind_a_grammar_that_compiles():
    canonical.install()
    repairs.grammars_without_queue()
    queued = []
    manager = object.__new__(StructuredOutputManager)
    manager.backend = backend()
    manager._use_async_grammar_compilation = True
    manager.executor = SimpleNamespace(submit=lambda work, request: queued.append(request))

    def begin(pattern):
        key = (StructuredOutputOptions.REGEX, pattern)
        asked = SimpleNamespace(structured_output_key=key, grammar=None)
        manager.grammar_init(
            SimpleNamespace(
                structured_output_request=asked,
                sampling_params=SimpleNamespace(structured_outputs=1),
            )
        )
        return asked.grammar

    known = canonical.spell([1, 2])
    canonical.compile_index(known, LETTERS.get_eos_token_id())
    assert begin(known).validate_tokens([1, 2]) == [1, 2]
    assert not queued
    begin(canonical.spell([3, 4]))
    begin("abc")
    assert len(queued) == 2
