"""Remote images: what may be fetched, from which address, how much, how long and how many."""

import asyncio
import socket
import time

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from serving.app import build_app
from serving.errors import BadRequestError, OverloadedError, UnfetchableImageError
from serving.following import Bulletin
from serving.image_hosts import HostRule, Place, is_public, read_rules
from serving.images import ImageLimits
from serving.labeler import Labeler
from serving.metrics import Metrics
from serving.registry import Registry
from serving.remote_images import RemoteImages
from serving.settings import Settings
from tests.pictures import data_url, encoded, noise
from tests.serving.fake_engine import FakeEngine
from tests.serving.image_host import answer, certified, drip, image_host
from tests.serving.test_labeler import catalogue

PICTURES = [encoded(noise(seed)) for seed in range(3)]
PICTURE = PICTURES[0]
LIMITS = ImageLimits(max_images=3, max_bytes=100_000)
HOST = "img.example.org"

REFUSED_URLS = [
    "http://127.0.0.1/x",
    "http://0x7f000001/x",
    "http://2130706433/x",
    "http://0177.0.0.1/x",
    "http://127.1/x",
    "http://1.1.1.1/x",
    "http://[::1]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://[fe80::1%25eth0]/x",
    "http://localhost/x",
    "http://localhost./x",
    f"http://{HOST}./x",
    f"http://user@{HOST}/x",
    f"http://user:secret@{HOST}/x",
    f"http://evil.example/@{HOST}/x",
    f"http://{HOST}@evil.example/x",
    f"http://{HOST}\\@evil.example/x",
    f"http:\\\\{HOST}\\x",
    f"http://{HOST}\\.evil.example/x",
    f"http://{HOST}.evil.example/x",
    f"http://evil{HOST}/x",
    f"http:///{HOST}/x",
    f"http:{HOST}/x",
    f"http://{HOST}:22/x",
    f"http://{HOST}:8000/x",
    f"http://{HOST}:0/x",
    f"http://{HOST}:80443/x",
    f"http://{HOST}:/x",
    f"http://{HOST}:\u0668\u0660/x",
    f"http://{HOST}/x y",
    f"http://{HOST}/x\r\nHost: evil.example",
    f"http://{HOST}/\x00",
    f" http://{HOST}/x",
    f"http://{HOST}\t/x",
    "http://\u0131mg.example.org/x",
    "http://img.example.org\u212a/x",
    f"http://{HOST}/{'x' * 3000}",
    f"//{HOST}/x",
    f"ftp://{HOST}/x",
    f"gopher://{HOST}/x",
    f"HTTP+UNIX://{HOST}/x",
    "file:///etc/passwd",
    "",
]

AWAY = [url for url in REFUSED_URLS if "://" in url and ":///" not in url and url.isprintable()]
"""Those that are URLs of another place where they stand as a Location."""

PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254",
    "172.16.0.1", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "100::1", "2001::1", "2001:db8::1",
    "2002:7f00:1::", "2002:a00:1::", "3fff::1", "5f00::1", "fc00::1", "fd12::1", "fe80::1",
    "fe80::1%1", "2606:4700::1%eth0", "fec0::1", "ff02::1", "not an address", "",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "93.184.215.14", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]


def resolving(*addresses):
    async def resolve(host, port):
        return list(addresses)

    return resolve


def remote(rules=HOST, **options):
    return RemoteImages(read_rules(rules), **({"max_bytes": LIMITS.max_bytes} | options))


def local(host, rules=None, **options):
    """Fetches from the stub: its address alone is let through, in place of the real check."""
    return remote(
        rules or f"{HOST}:{host.port}",
        **({"resolve": resolving("127.0.0.1"), "is_allowed": "127.0.0.1".__eq__} | options),
    )


async def fetched(images, url):
    (found,) = await images.read([url], LIMITS, "image")
    return found


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_that_is_not_public_passes(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_pass(address):
    assert is_public(address)


@pytest.mark.parametrize("url", REFUSED_URLS)
async def test_a_url_that_is_odd_or_of_another_host_is_refused_before_any_lookup(url):
    async def resolve(host, port):
        pytest.fail(f"looked up {host}")

    with pytest.raises(BadRequestError) as refused:
        await fetched(remote(resolve=resolve), url)
    assert refused.value.code == "image_url_not_allowed"


@pytest.mark.parametrize("url", [f"http://{HOST}/x", "https://example.org/", *REFUSED_URLS])
async def test_without_allowed_hosts_every_url_is_refused(url):
    with pytest.raises(BadRequestError) as refused:
        await fetched(remote(""), url)
    assert refused.value.code == "image_url_not_allowed"


@pytest.mark.parametrize(
    ("rule", "host", "port", "is_allowed"),
    [
        ("example.org", "example.org", 80, True),
        ("example.org", "example.org", 443, True),
        ("Example.ORG", "example.org", 443, True),
        ("example.org", "example.org", 8443, False),
        ("example.org", "img.example.org", 443, False),
        ("*.example.org", "img.example.org", 443, True),
        ("*.example.org", "a.b.example.org", 443, True),
        ("*.example.org", "example.org", 443, False),
        ("*.example.org", "evilexample.org", 443, False),
        ("example.org:8443", "example.org", 8443, True),
        ("example.org:8443", "example.org", 443, False),
        ("*.example.org:8443", "x.example.org", 8443, True),
    ],
)
def test_a_rule_allows_its_names_and_ports_only(rule, host, port, is_allowed):
    assert HostRule.read(rule).allows(host, port) is is_allowed


@pytest.mark.parametrize(
    "entry", ["127.0.0.1", "*", "*.", "http://example.org", "a b", "[::1]", "x:99999", "*.1.2.3.4"]
)
def test_an_entry_that_is_no_host_name_is_told_at_the_start(entry):
    with pytest.raises(ValidationError, match="a host is a name"):
        Settings(image_hosts=f"example.org,{entry}")


def test_a_url_keeps_path_query_and_port_and_loses_its_fragment():
    place = Place.read("HTTPS://Img.Example.org:8443/a%20b/c?d=e@f#g", "image")
    assert (place.scheme, place.authority) == ("https", "img.example.org:8443")
    assert place.at("2606:4700::1") == "https://[2606:4700::1]:8443/a%20b/c?d=e@f"
    assert Place.read("http://example.org?x", "image").at("1.1.1.1") == "http://1.1.1.1:80/?x"


@pytest.mark.parametrize("address", ["127.0.0.1", "::ffff:127.0.0.1"])
async def test_a_name_at_a_private_address_is_refused_and_nothing_connects(address):
    async with image_host() as host:
        images = remote(f"{HOST}:{host.port}", resolve=resolving(address))
        with pytest.raises(BadRequestError) as refused:
            await fetched(images, f"http://{HOST}:{host.port}/x")
        assert host.num_connections == 0
    assert refused.value.code == "image_url_not_allowed"
    assert address not in refused.value.message


async def test_one_private_address_among_public_ones_is_enough_to_refuse():
    images = remote(resolve=resolving("1.1.1.1", "127.0.0.1"))
    with pytest.raises(BadRequestError, match="not at a public address"):
        await fetched(images, f"http://{HOST}/x")


async def test_the_refusal_does_not_tell_one_private_address_from_another():
    said = set()
    for address in ("10.0.0.1", "127.0.0.1", "169.254.169.254", "fd00::1"):
        with pytest.raises(BadRequestError) as refused:
            await fetched(remote(resolve=resolving(address)), f"http://{HOST}/x")
        said.add(refused.value.message)
    assert len(said) == 1


async def test_localhost_is_refused_by_its_address_even_where_its_name_is_allowed():
    async with image_host() as host:
        with pytest.raises(BadRequestError, match="not at a public address"):
            await fetched(remote(f"localhost:{host.port}"), f"http://localhost:{host.port}/x")
        assert host.num_connections == 0


async def test_an_image_of_an_allowed_host_arrives_with_its_own_bytes():
    async with image_host() as host:
        host.answers["/cat.png?w=3"] = answer(PICTURE)
        images = local(host)
        assert await fetched(images, f"http://{HOST}:{host.port}/cat.png?w=3") == PICTURE
        head = host.heads[0].lower()
        assert f"host: {HOST}:{host.port}" in head
        assert "accept-encoding: identity" in head
        assert "cookie" not in head
        assert "authorization" not in head


async def test_each_fetch_looks_the_name_up_once_and_connects_there():
    """A second answer of the resolver would be the attacker's chance (rebinding)."""
    lookups = []

    async def resolve(host, port):
        lookups.append(host)
        return ["127.0.0.1"] if len(lookups) == 1 else ["127.0.0.2"]

    async with image_host() as host:
        host.answers["/x"] = answer(PICTURE)
        images = local(host, resolve=resolve)
        assert await fetched(images, f"http://{HOST}:{host.port}/x") == PICTURE
        assert lookups == [HOST]


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    async with image_host() as host:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        host.answers["/x"] = answer(PICTURE)
        assert await fetched(local(host), f"http://{HOST}:{host.port}/x") == PICTURE


async def test_data_urls_and_remote_ones_keep_their_order():
    async with image_host() as host:
        host.answers["/1"] = answer(PICTURES[1])
        urls = [data_url(PICTURE), f"http://{HOST}:{host.port}/1", data_url(PICTURES[2])]
        found = await local(host).read(urls, LIMITS, "image")
    assert found == PICTURES


async def test_all_images_are_counted_and_all_urls_checked_before_any_is_fetched():
    async with image_host() as host:
        url = f"http://{HOST}:{host.port}/x"
        for urls in ([url] * 1000, [url, "http://other.example/x"]):
            with pytest.raises(BadRequestError):
                await local(host).read(urls, LIMITS, "image")
        assert host.num_connections == 0


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 T", "308 P"])
async def test_a_redirect_to_the_same_host_is_followed(status):
    async with image_host() as host:
        host.answers |= {"/a": answer(status=status, Location="/b"), "/b": answer(PICTURE)}
        assert await fetched(local(host), f"http://{HOST}:{host.port}/a") == PICTURE


@pytest.mark.parametrize("target", AWAY)
async def test_a_redirect_is_checked_like_a_url(target):
    async with image_host() as host, image_host() as inside:
        target = target.replace("127.0.0.1/", f"127.0.0.1:{inside.port}/")
        host.answers["/a"] = answer(status="302 Found", Location=target)
        with pytest.raises((BadRequestError, UnfetchableImageError)):
            await fetched(local(host), f"http://{HOST}:{host.port}/a")
        assert inside.num_connections == 0
        assert host.num_connections == 1


async def test_a_redirect_to_an_allowed_name_at_a_private_address_is_refused():
    async def resolve(host, port):
        return ["127.0.0.1"] if host == HOST else ["127.0.0.2"]

    async with image_host() as host, image_host() as inside:
        other = f"other.example:{inside.port}"
        host.answers["/a"] = answer(status="302 Found", Location=f"http://{other}/x")
        images = local(host, f"{HOST}:{host.port},{other}", resolve=resolve)
        with pytest.raises(BadRequestError, match="not at a public address"):
            await fetched(images, f"http://{HOST}:{host.port}/a")
        assert inside.num_connections == 0


async def test_redirects_end():
    async with image_host() as host:
        host.answers["/a"] = answer(status="302 Found", Location="/a")
        with pytest.raises(UnfetchableImageError, match="redirects"):
            await fetched(local(host), f"http://{HOST}:{host.port}/a")
        assert host.num_connections == 4


FAULTS = {
    "404": answer(b"no", "404 Not Found"),
    "500": answer(b"no", "500 Oops"),
    "206": answer(b"no", "206 Partial Content"),
    "204": answer(b"", "204 No Content"),
    "a page": answer(b"<html>", kind="text/html"),
    "no type": answer(PICTURE, kind=""),
    "gzip": answer(PICTURE, Content_Encoding="gzip"),
    "10 GB announced": answer(b"x", Content_Length=str(10**10)),
    "a length of 10,000 digits": answer(b"x", Content_Length="9" * 10_000),
    "a length that is none": answer(b"x", Content_Length="-1"),
    "shorter than announced": answer(b"x", Content_Length="100"),
    "over the limit": answer(b"x" * 100_001),
    "endless": drip(b"x" * 65_536, 0),
    "a byte now and then": drip(b"x", 0.02),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_is_no_whole_image_in_time_and_size_is_a_422(fault):
    async with image_host() as host:
        host.answers["/x"] = FAULTS[fault]
        images = local(host, timeout_s=1.0)
        with pytest.raises(UnfetchableImageError) as failed:
            await fetched(images, f"http://{HOST}:{host.port}/x")
        assert failed.value.status == 422
        assert failed.value.code == "image_unfetchable"
        assert "127.0.0.1" not in failed.value.message
        await until(lambda: host.num_open == 0)


async def until(is_so, limit_s=20.0):
    ends = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


async def test_a_silent_host_a_closed_port_and_an_unknown_name_are_422():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]  # bound, and nobody listens

        async def fails(host, port):
            raise socket.gaierror(-2, "Name or service not known")

        async def hangs(host, port):
            await asyncio.sleep(60)

        for resolve in (resolving("127.0.0.1"), fails, hangs):
            images = remote(
                f"{HOST}:{port}", resolve=resolve, is_allowed=lambda address: True, timeout_s=0.5
            )
            with pytest.raises(UnfetchableImageError):
                await fetched(images, f"http://{HOST}:{port}/x")


async def test_fetches_at_once_are_bounded_and_waiting_too():
    async with image_host() as host:
        host.answers["/x"] = drip(b"x", 0.05)
        images = local(host, max_fetches=2, timeout_s=1.5)
        url = f"http://{HOST}:{host.port}/x"
        found = await asyncio.gather(
            *(fetched(images, url) for _ in range(12)), return_exceptions=True
        )
        kinds = [type(error) for error in found]
        assert host.most_open <= 2
        assert kinds.count(OverloadedError) == 12 - 2 - 4
        assert kinds.count(UnfetchableImageError) == 6
        host.answers["/x"] = answer(PICTURE)
        assert await fetched(images, url) == PICTURE  # every slot came back


async def test_a_client_that_leaves_ends_its_fetch():
    async with image_host() as host:
        host.answers["/x"] = drip(b"x", 0.01)
        task = asyncio.ensure_future(fetched(local(host), f"http://{HOST}:{host.port}/x"))
        await until(lambda: host.num_open == 1)
        task.cancel()
        await until(lambda: host.num_open == 0)


async def test_https_checks_the_certificate_against_the_name_not_the_address(tmp_path):
    served, trusted = certified(tmp_path, HOST)
    async with image_host(served) as host:
        host.answers["/x"] = answer(PICTURE)
        rules = f"{HOST}:{host.port},other.example:{host.port}"
        images = local(host, rules, authorities=trusted)
        assert await fetched(images, f"https://{HOST}:{host.port}/x") == PICTURE
        with pytest.raises(UnfetchableImageError):
            await fetched(images, f"https://other.example:{host.port}/x")
        with pytest.raises(UnfetchableImageError):  # nobody that is trusted by default signed it
            await fetched(local(host, rules), f"https://{HOST}:{host.port}/x")


async def test_https_never_leads_to_http(tmp_path):
    served, trusted = certified(tmp_path, HOST)
    async with image_host(served) as host, image_host() as plain:
        host.answers["/a"] = answer(status="302 F", Location=f"http://{HOST}:{plain.port}/x")
        rules = f"{HOST}:{host.port},{HOST}:{plain.port}"
        with pytest.raises(BadRequestError, match="https to http"):
            await fetched(local(host, rules, authorities=trusted), f"https://{HOST}:{host.port}/a")
        assert plain.num_connections == 0


@pytest.fixture
def served(published_tokenizer):
    """A client of an app over a fake engine, with remote images as told."""

    def make(images):
        labeler = Labeler(FakeEngine(), catalogue(), published_tokenizer)
        app = build_app(
            labeler,
            Settings(),
            Metrics(CollectorRegistry()),
            bulletin=Bulletin(labeler.catalogue),
            adapters=Registry(None, check=None),
            remote=images,
        )
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    return make


def bodies(url):
    """The same image in both endpoints."""
    part = {"type": "image_url", "image_url": {"url": url}}
    chat = {"model": "base", "messages": [{"role": "user", "content": [part]}]}
    return {"/v1/label": {"image": url}, "/v1/chat/completions": chat}


@pytest.mark.parametrize("endpoint", ["/v1/label", "/v1/chat/completions"])
async def test_both_endpoints_take_an_allowed_url_and_say_why_they_do_not(served, endpoint):
    async with image_host() as host:
        host.answers["/x"] = answer(PICTURE)
        host.answers["/html"] = answer(b"<html>")
        client = served(local(host))
        for path, status, code in [
            ("x", 200, None),
            ("gone", 422, "image_unfetchable"),
            ("html", 400, "invalid_image"),
        ]:
            body = bodies(f"http://{HOST}:{host.port}/{path}")[endpoint]
            answered = await client.post(endpoint, json=body)
            assert answered.status_code == status, answered.text
            assert status == 200 or answered.json()["error"]["code"] == code


@pytest.mark.parametrize("endpoint", ["/v1/label", "/v1/chat/completions"])
async def test_by_default_no_url_is_fetched(served, endpoint):
    async with image_host() as host:
        body = bodies(f"http://127.0.0.1:{host.port}/x")[endpoint]
        answered = await served(None).post(endpoint, json=body)
        assert answered.status_code == 400
        assert answered.json()["error"]["code"] == "image_url_not_allowed"
        assert host.num_connections == 0
