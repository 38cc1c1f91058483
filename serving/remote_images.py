"""Images behind http(s) URLs, for operators who allow hosts: fetched from checked public addresses.

Off unless `--image-hosts` names hosts. A URL is read strictly, its host must be allowed, every
address that the name resolves to must be public, and the connection goes to such an address itself:
no second resolution could answer otherwise. TLS checks the certificate against the name. Redirects
start over. Proxies, netrc and cookies are never used.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import httpx

from serving.errors import BadRequestError, OverloadedError, UnfetchableImageError
from serving.image_hosts import HostRule, Place, is_public, refused
from serving.images import ImageLimits, read_data_url

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host name and port to addresses; raises OSError where there are none."""

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llava-sieve"}


@functools.cache
def _public_authorities() -> ssl.SSLContext:
    return httpx.create_ssl_context()


class RemoteImages:
    """Fetches images from allowed hosts, a bounded number at once.

    Args:
        rules: allowed hosts; none means that no URL is fetched.
        timeout_s: for all images of a request together, from the first wait to the last byte.
        max_bytes: of one image.
        max_fetches: at once; twice as many may wait.
        resolve: names to addresses; the system's resolver by default.
        is_allowed: which addresses may be connected to.
        authorities: who may vouch for https hosts; by default the public ones.
    """

    def __init__(
        self,
        rules: Sequence[HostRule],
        *,
        timeout_s: float = 5.0,
        max_bytes: int = 10_000_000,
        max_fetches: int = 8,
        resolve: Resolve | None = None,
        is_allowed: Callable[[str], bool] = is_public,
        authorities: ssl.SSLContext | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self._timeout_s, self._max_bytes, self._max_fetches = timeout_s, max_bytes, max_fetches
        # A lookup that hangs holds one of these threads, never the loop's own.
        self._lookups = ThreadPoolExecutor(max_fetches, thread_name_prefix="image-host")
        self._resolve = resolve or self._system_resolve
        self._is_allowed, self._authorities = is_allowed, authorities
        self._slots = asyncio.Semaphore(max_fetches)
        self._waiting = 0

    async def read(self, urls: Sequence[str], limits: ImageLimits, param: str) -> list[bytes]:
        """The encoded images of a request, in order; their number is checked before anything else.

        Raises:
            BadRequestError: too many images, or one whose URL is not allowed.
            UnfetchableImageError: an allowed host did not give an image.
            OverloadedError: too many images are being fetched.
        """
        if len(urls) > limits.max_images:
            raise BadRequestError(
                f"{len(urls)} images, allowed are {limits.max_images} a request", param=param
            )
        places = [self._place(url, param) for url in urls]
        read = {
            i: read_data_url(url, limits, param) for i, url in enumerate(urls) if places[i] is None
        }
        read |= await self._fetch_all({i: p for i, p in enumerate(places) if p is not None}, param)
        return [read[i] for i in range(len(urls))]

    def _place(self, url: str, param: str) -> Place | None:
        """Where a remote URL points; None for what `read_data_url` accepts or refuses."""
        if not self.rules or not url[:8].lower().startswith(("http:", "https:")):
            return None
        return self._allowed(url, param)

    def _allowed(self, url: str, param: str) -> Place:
        place = Place.read(url, param)
        if not any(rule.allows(place.host, place.port) for rule in self.rules):
            raise refused(
                f"{param}: this server fetches no images from {place.authority!r}; its operator "
                "allows hosts by --image-hosts",
                param,
            )
        return place

    async def _fetch_all(self, places: dict[int, Place], param: str) -> dict[int, bytes]:
        if not places:
            return {}
        tasks = [asyncio.ensure_future(self._fetch(place, param)) for place in places.values()]
        try:
            async with asyncio.timeout(self._timeout_s):
                return dict(zip(places, await asyncio.gather(*tasks), strict=True))
        except TimeoutError as error:
            raise UnfetchableImageError(
                f"{param}: no whole image within {self._timeout_s:g} s", param=param
            ) from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fetch(self, place: Place, param: str) -> bytes:
        async with self._slot(param):
            for _ in range(MAX_REDIRECTS + 1):
                answer = await self._ask(place, param)
                if isinstance(answer, bytes):
                    return answer
                if place.scheme == "https" and answer.scheme == "http":
                    raise refused(f"{param} leads from https to http", param)
                place = answer
        raise UnfetchableImageError(f"{param}: over {MAX_REDIRECTS} redirects", param=param)

    @contextlib.asynccontextmanager
    async def _slot(self, param: str) -> AsyncIterator[None]:
        if self._waiting >= 2 * self._max_fetches:
            raise OverloadedError(
                f"{self._max_fetches} images are being fetched and {self._waiting} wait; try again "
                "shortly, or send the image itself",
                param=param,
                code="too_many_fetches",
            )
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._slots.release()

    async def _ask(self, place: Place, param: str) -> bytes | Place:
        """One request: the image, or where it redirects to."""
        addresses = await self._addresses(place, param)
        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await self._ask_at(address, place, param)
        try:
            return await self._ask_at(addresses[-1], place, param)
        except httpx.HTTPError as error:
            raise UnfetchableImageError(
                f"{param}: {place.authority} could not be read ({type(error).__name__})",
                param=param,
            ) from error

    async def _addresses(self, place: Place, param: str) -> list[str]:
        try:
            addresses = await self._resolve(place.host, place.port)
        except (OSError, UnicodeError) as error:
            raise UnfetchableImageError(
                f"{param}: the name {place.host!r} does not resolve", param=param
            ) from error
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise refused(
                f"{param}: {place.host!r} is not at a public address, so it is not fetched", param
            )
        return addresses[:2]

    async def _system_resolve(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._lookups,
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
        )
        return list(dict.fromkeys(str(info[4][0]) for info in found))

    async def _ask_at(self, address: str, place: Place, param: str) -> bytes | Place:
        timeout = httpx.Timeout(self._timeout_s, connect=self._timeout_s / 2)
        verify = self._authorities or _public_authorities()
        async with httpx.AsyncClient(trust_env=False, verify=verify) as client:
            # The connection is to the checked address; name and certificate stay the host's.
            request = httpx.Request(
                "GET",
                place.at(address),
                headers={"Host": place.authority, **_HEADERS},
                extensions={"sni_hostname": place.host, "timeout": timeout.as_dict()},
            )
            response = await client.send(request, stream=True, follow_redirects=False)
            try:
                return await self._read(response, place, param)
            finally:
                await response.aclose()

    async def _read(self, response: httpx.Response, place: Place, param: str) -> bytes | Place:
        if response.status_code in _REDIRECTS and "location" in response.headers:
            url = f"{place.scheme}://{place.authority}{place.target}"
            return self._allowed(urljoin(url, response.headers["location"]), param)
        self._check_head(response, place, param)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_bytes:
                raise self._too_large(param)
        return bytes(body)

    def _check_head(self, response: httpx.Response, place: Place, param: str) -> None:
        kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        length = response.headers.get("content-length", "0")
        reason = None
        if response.status_code != 200:
            reason = f"answered {response.status_code}"
        elif not kind.startswith("image/") and kind != "application/octet-stream":
            reason = f"sent {kind[:40]!r}, which is no image"
        elif encoding != "identity":
            reason = f"sent it {encoding[:20]!r}-encoded, and only plain bytes are read"
        if reason is not None:
            raise UnfetchableImageError(f"{param}: {place.authority} {reason}", param=param)
        if not length.isdecimal() or int(length[:20]) > self._max_bytes:
            raise self._too_large(param)

    def _too_large(self, param: str) -> UnfetchableImageError:
        return UnfetchableImageError(
            f"{param} has over {self._max_bytes} bytes; scale the image down", param=param
        )

    def close(self) -> None:
        """Lets the threads end."""
        self._lookups.shutdown(wait=False, cancel_futures=True)
