"""What holds for every input: parsers give a value or say in their own error why not."""

import base64
import csv
import io
import json
import math

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bench.bad_pictures import FORMATS, small
from bench.bad_requests import BASE, CHAT, LABEL, data_url
from bench.stub_app import stub_app
from patches.config import Retention
from patches.selection import SELECTORS
from serving.bodies import MAX_DEPTH, MAX_KEYS, read_json
from serving.errors import BadRequestError, ConfigError
from serving.images import ImageLimits, decode_image, read_base64, read_data_url
from serving.keys import hash_of, new_key, read_keys
from serving.posts import read_posts
from serving.posts.post import Post, Unreadable
from serving.schema import ChatRequest, LabelRequest
from serving.settings import Settings
from serving.structures import LabelStructure, load_structures, make_structure

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=200_000)
MANY = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
LABELS = st.lists(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8),
    min_size=1,
    max_size=5,
    unique=True,
)


def tried(kind, make):
    """A value and no error, or the error of the one kind that is allowed."""
    try:
        return make(), None
    except kind as error:
        return None, error


@given(raw=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@MANY
def test_a_body_is_what_json_says_or_is_refused(raw):
    value, error = tried(BadRequestError, lambda: read_json(raw))
    if error is not None:
        assert error.status == 400
        assert len(error.message) < 300
        return
    assert value == json.loads(raw)


@given(value=JSON)
@MANY
def test_every_json_value_that_text_can_hold_is_read(value):
    assume(max(_depth(value), 0) <= MAX_DEPTH)
    text = json.dumps(value, ensure_ascii=False)
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return
    assert read_json(raw) == value


def _depth(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(_depth, inside), default=0)


@given(names=st.lists(TEXT, min_size=1, max_size=8))
@MANY
def test_a_key_that_comes_twice_is_refused_and_no_other(names):
    raw = "{" + ",".join(f"{json.dumps(name)}: 1" for name in names) + "}"
    if len(set(names)) == len(names):
        assert read_json(raw.encode()).keys() == set(names)
    else:
        with pytest.raises(BadRequestError, match="twice"):
            read_json(raw.encode())


@pytest.mark.parametrize("extra", [0, 1])
def test_limits_of_a_body_are_where_they_say(extra):
    keys = json.dumps({str(number): 0 for number in range(MAX_KEYS + extra)}).encode()
    deep = b"[" * (MAX_DEPTH + extra) + b"1" + b"]" * (MAX_DEPTH + extra)
    for raw in (keys, deep):
        if extra:
            with pytest.raises(BadRequestError):
                read_json(raw)
        else:
            assert read_json(raw)


@given(entry=JSON | st.fixed_dictionaries(
    {"fields": st.dictionaries(TEXT, st.lists(TEXT, max_size=4), max_size=3) | JSON},
    optional={"prompt": TEXT.map(lambda text: text + "{text}") | JSON, "answer": TEXT | JSON},
))  # fmt: skip
@MANY
def test_a_structure_is_made_or_refused(entry):
    structure, error = tried(ConfigError, lambda: make_structure("mine", entry))
    if error is not None:
        assert error.message
        return
    for labels in list(structure.answers())[:20]:
        assert structure.render(labels)


@given(fields=st.dictionaries(
    st.sampled_from(["a", "b", "verdict", "tone"]), LABELS, min_size=1, max_size=3))  # fmt: skip
@MANY
def test_what_a_structure_renders_it_parses_back(fields):
    answer = "; ".join(f"{{{name}}}" for name in fields)
    structure = make_structure("mine", {"fields": fields, "prompt": "{text}", "answer": answer})
    for labels in list(structure.answers())[:20]:
        assert structure.parse(structure.render(labels)) == labels
    assert isinstance(structure, LabelStructure)


@given(
    text=TEXT | JSON.map(yaml.safe_dump) | st.text(alphabet="{}[]:,-&*!|>'\"% \n\tab", max_size=40)
)
@MANY
def test_a_file_of_structures_is_read_or_refused(text, tmp_path):
    path = tmp_path / "structures.yaml"
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    found, error = tried(ConfigError, lambda: load_structures(path))
    if error is not None:
        assert error.message
        return
    assert all(isinstance(each, LabelStructure) for each in found.values())


@given(text=TEXT | JSON.map(yaml.safe_dump) | st.lists(st.fixed_dictionaries(
    {"name": TEXT | st.just("me"), "sha256": TEXT | st.just(hash_of("x"))},
    optional={"admin": JSON, "adapters": JSON, "max_concurrency": JSON, "per_minute": JSON},
), max_size=3).map(yaml.safe_dump))  # fmt: skip
@MANY
def test_a_file_of_keys_is_read_or_refused_without_showing_a_hash(text, tmp_path):
    path = tmp_path / "keys.yaml"
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError:
        return
    path.chmod(0o600)
    keys, error = tried(ConfigError, lambda: read_keys(path))
    if error is not None:
        assert hash_of("x") not in error.message
        return
    assert keys
    assert hash_of("x") not in repr(keys)


def test_keys_are_random_and_long():
    made = {new_key() for _ in range(200)}
    assert len(made) == 200
    assert min(map(len, made)) >= 43


@given(ratio=st.floats() | st.integers() | st.booleans() | st.none() | TEXT,
       selector=st.sampled_from(sorted(SELECTORS)) | TEXT,
       patches=st.integers(1, 1024))  # fmt: skip
@MANY
def test_a_retention_keeps_some_patches_or_is_refused(ratio, selector, patches):
    retention, error = tried(ValueError, lambda: Retention(ratio=ratio, selector=selector))
    if error is not None:
        assert "allowed" in str(error)
        return
    assert 1 <= retention.num_kept(patches) <= patches
    assert retention.num_kept(patches) == max(1, math.floor(ratio * patches + 0.5))
    assert Retention(ratio=1.0, selector=selector).num_kept(patches) == patches


@given(url=st.text(max_size=200) | st.builds(
    "data:{},{}".format, st.sampled_from(["image/png;base64", "image/png", ";base64", ""]),
    st.text(max_size=60)))  # fmt: skip
@MANY
def test_any_url_is_bytes_or_refused(url):
    raw, error = tried(BadRequestError, lambda: read_data_url(url, LIMITS, "image"))
    assert isinstance(raw, bytes) if error is None else error.param == "image"


@given(raw=st.binary(max_size=2000), width=st.integers(1, 90))
@MANY
def test_base64_gives_back_what_was_encoded_however_it_is_broken_into_lines(raw, width):
    payload = base64.b64encode(raw).decode()
    lines = "\r\n".join(payload[at : at + width] for at in range(0, len(payload), width))
    assert read_base64(lines, LIMITS, "image") == raw
    assert read_data_url(f"data:image/png;base64,{lines}", LIMITS, "image") == raw


MAGIC = [small(form)[:size] for form in FORMATS for size in (4, 16, 40, 200)]


@given(start=st.sampled_from([b"", *MAGIC]), rest=st.binary(max_size=400))
@MANY
def test_any_bytes_are_an_image_or_refused(start, rest):
    image, error = tried(BadRequestError, lambda: decode_image(start + rest, LIMITS))
    if error is not None:
        assert (error.status, error.param) == (400, "image")
        return
    assert image.mode == "RGB"
    assert image.width * image.height <= LIMITS.max_pixels


ROWS = st.lists(JSON | st.dictionaries(
    st.sampled_from(["id", "text", "image", "images", "labels", "sentiment", "messages", "body"]),
    JSON | st.just("a.png"), max_size=5), max_size=4)  # fmt: skip


def csv_of(rows):
    buffer = io.StringIO()
    csv.writer(buffer).writerows([[str(cell) for cell in row] for row in rows])
    return buffer.getvalue().encode("utf-8", "surrogatepass")


SOURCES = {
    "posts.jsonl": ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    "posts.csv": st.lists(st.lists(TEXT | st.sampled_from(["id", "text", "image"]), max_size=5),
                          max_size=5).map(csv_of),
    "posts.json": ROWS.map(lambda rows: json.dumps(rows).encode()),
    "posts.parquet": st.binary(max_size=100).map(lambda raw: b"PAR1" + raw + b"PAR1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
@given(data=st.data())
@MANY
def test_any_file_of_posts_gives_posts_rows_with_a_reason_or_one_error(name, data, tmp_path):
    path = tmp_path / name
    path.write_bytes(data.draw(SOURCES[name] | st.binary(max_size=200)))
    entries, error = tried(ConfigError, lambda: list(read_posts(path).entries()))
    if error is not None:
        assert error.message
        return
    assert all(isinstance(entry, Post | Unreadable) for entry in entries)


PICTURE = data_url(small("PNG"))
FIELDS = [
    *((LABEL, name) for name in sorted(LabelRequest.model_fields)),
    *((CHAT, name) for name in sorted(ChatRequest.model_fields)),
]
USUAL = {
    LABEL: {"text": "x"},
    CHAT: {"model": BASE, "messages": [{"role": "user", "content": "x"}]},
}
NEAR = st.sampled_from([
    0, 1, -1, 0.5, 1.0, 2, 20, 2**63, "cls", "sentiment", "llavac", BASE, "x", [0.2, 1.0], ["x"],
    {"include_usage": True}, {"choice": ["a"]}, {"type": "text"}, {"5": 1.0}, PICTURE, [PICTURE],
    True,
])  # fmt: skip


@pytest.fixture(scope="module")
def app_settings():
    return Settings(model_name=BASE, image_workers=0)


@pytest.mark.parametrize(("path", "name"), FIELDS)
async def test_any_value_of_any_field_is_answered_or_a_400(path, name, app_settings):
    values = []

    @given(value=JSON | NEAR)
    @settings(max_examples=25, deadline=None, database=None)
    def collect(value):
        values.append(value)

    collect()
    async with stub_app(app_settings) as app:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for value in values:
                answer = await client.post(path, json={**USUAL[path], name: value})
                assert answer.status_code in (200, 400, 404, 503), (value, answer.text)
                if answer.status_code != 200:
                    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
                if answer.status_code == 503:
                    assert (name, "retry-after" in answer.headers) == ("timeout_s", True)
