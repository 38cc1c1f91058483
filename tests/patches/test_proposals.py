"""Proposed answers: forced ids, likely labels, bounds; and the worker's side of the bargain."""

import inspect

import outlines_core as oc
import pytest
import torch
from vllm.v1.structured_output.backend_outlines import OutlinesGrammar

from patches import canonical, repairs
from patches.proposals import AnswerBook, NoProposer, propose
from serving.constraint import pattern_of

EOS = 2
COMMA, GOOD, BAD, FAIR = 11, 21, 22, 23
ANSWERS = [[a, COMMA, b, COMMA, c] for a in (21, 22, 23) for b in (21, 22, 23) for c in (21, 22)]


def grammar_after(answer=()):
    index = canonical.compile_index(pattern_of(ANSWERS), EOS)
    grammar = OutlinesGrammar(
        vocab_size=64, eos_token_id=EOS, guide=oc.Guide(index, max_rollback=8)
    )
    assert grammar.accept_tokens("one", list(answer))
    return grammar


def test_only_what_is_forced_is_proposed_before_any_answer_is_known():
    assert propose(grammar_after([GOOD]), AnswerBook(), "kind", [GOOD], 4) == [COMMA]
    assert propose(grammar_after(), AnswerBook(), "kind", [], 4) == []


def test_the_likeliest_rest_after_the_labels_so_far_is_proposed():
    book = AnswerBook()
    for answer in ([GOOD, COMMA, BAD, COMMA, GOOD], [BAD, COMMA, FAIR, COMMA, BAD]):
        book.observe("kind", answer)
    assert propose(grammar_after([GOOD]), book, "kind", [GOOD], 3) == [COMMA, BAD, COMMA]
    assert propose(grammar_after([BAD]), book, "kind", [BAD], 8) == [COMMA, FAIR, COMMA, BAD]
    assert propose(grammar_after([BAD]), book, "another", [BAD], 8) == [COMMA]


def test_more_frequent_answers_win():
    book = AnswerBook()
    for last in (GOOD, BAD, BAD):
        book.observe("kind", [FAIR, COMMA, FAIR, COMMA, last])
    start = [FAIR, COMMA, FAIR, COMMA]
    assert propose(grammar_after(start), book, "kind", start, 3) == [BAD]


@pytest.mark.parametrize("room", [-1, 0, 1, 2, 3])
def test_no_more_is_proposed_than_there_is_room_for(room):
    book = AnswerBook()
    book.observe("kind", ANSWERS[0])
    proposed = propose(grammar_after([GOOD]), book, "kind", [GOOD], room)
    assert proposed == ANSWERS[0][1:4][: max(0, room)]


def test_the_grammar_stands_where_it_stood():
    book, grammar = AnswerBook(), grammar_after([GOOD])
    book.observe("kind", ANSWERS[0])
    before = sorted(grammar.guide.get_tokens())
    assert propose(grammar, book, "kind", [GOOD], 8)
    assert sorted(grammar.guide.get_tokens()) == before
    assert grammar.accept_tokens("one", [COMMA, BAD])


def test_what_the_grammar_forbids_is_never_proposed():
    """As when two structures came under one name, one after the other."""
    book = AnswerBook()
    book.observe("kind", [GOOD, COMMA, 40, COMMA, GOOD])
    assert propose(grammar_after([GOOD]), book, "kind", [GOOD], 8) == [COMMA]


def test_the_end_of_an_answer_is_not_proposed():
    assert propose(grammar_after(ANSWERS[0]), AnswerBook(), "kind", ANSWERS[0], 8) == []


def test_the_book_forgets_the_longest_unused():
    book = AnswerBook(max_prefixes=4)
    book.observe("old", [1, 2])
    book.observe("used", [3, 4])
    book.observe("used", [3, 5])
    book.observe("new", [6, 7])
    assert len(book) == 4
    assert book.likeliest("old", []) is None
    assert book.likeliest("new", [6]) == 7


def test_the_worker_proposes_nothing_for_each_request():
    assert NoProposer(None).propose([[1], [2, 3], []], "anything", slot_mappings=None) == [[]] * 3


def test_each_token_gets_its_requests_value():
    values = torch.tensor([0.5, 0.0, 2.0])
    got = repairs.expand_batch_to_tokens(values, torch.tensor([2, 3, 3]), 3, 0, 1)
    assert got.tolist() == [0.5, 0.5, 1.0]


def test_upstream_still_loses_the_temperatures_on_cpu():
    """When this fails, upstream is repaired: remove `temperatures_on_cpu`."""
    from vllm.utils import cpu_triton_utils

    repaired = "_rejection_greedy_sample_kernel_impl"
    assert "output_token_ids.copy_(" in inspect.getsource(getattr(cpu_triton_utils, repaired))
    assert ".copy_(" not in inspect.getsource(cpu_triton_utils._expand_kernel_impl)
