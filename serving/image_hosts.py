"""Which hosts images may be fetched from, how a URL is read, which addresses are public.

Names and numbers only; nothing here opens a connection (`remote_images` does).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from serving.errors import BadRequestError, ConfigError

MAX_URL_CHARS = 2_048
_PORTS = {"http": 80, "https": 443}
_HOST = r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_URL = re.compile(
    rf"(https?)://({_HOST})(?::([1-9][0-9]{{0,4}}))?(/[!-\[\]-~]*|\?[!-\[\]-~]*)?", re.I
)
_RULE = re.compile(rf"(\*\.)?({_HOST})(?::([1-9][0-9]{{0,4}}))?")
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.I | re.A)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NATIVE = ipaddress.IPv6Network("2000::/3")
_TUNNELS = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
)
_SPECIAL = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")))


def is_public(address: str) -> bool:
    """Whether an address is a global unicast one, and so is any that it stands for.

    IPv4 inside IPv6 (mapped, NAT64) counts as what it stands for; 6to4, Teredo and other tunnels
    are refused.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        return ip in _NATIVE and ip.is_global and not any(ip in net for net in _TUNNELS)
    if ip.is_multicast or ip.is_reserved or any(ip in net for net in _SPECIAL):
        return False
    return ip.is_global


@dataclass(frozen=True, kw_only=True)
class HostRule:
    """Hosts that may be fetched from.

    Attributes:
        host: a name, lower case.
        with_subdomains: whether `host` stands for the names below it instead.
        port: the only port, or None for 80 and 443.
    """

    host: str
    with_subdomains: bool = False
    port: int | None = None

    @classmethod
    def read(cls, text: str) -> HostRule:
        """From `example.org`, `*.example.org` or `example.org:8443`.

        Raises:
            ConfigError: it is none of these.
        """
        match = _RULE.fullmatch(text.strip().lower())
        if match is None or _NUMBER.fullmatch(match[2]) or not _is_port(match[3]):
            raise ConfigError(
                f"image_hosts has {text!r}; a host is a name such as img.example.org, "
                "*.example.org or example.org:8443, never an address",
                param="image_hosts",
            )
        return cls(
            host=match[2],
            with_subdomains=match[1] is not None,
            port=int(match[3]) if match[3] else None,
        )

    def allows(self, host: str, port: int) -> bool:
        """Whether this names the host, and the port is one of its."""
        if not (host.endswith(f".{self.host}") if self.with_subdomains else host == self.host):
            return False
        return port == self.port if self.port else port in _PORTS.values()


def read_rules(text: str) -> tuple[HostRule, ...]:
    """The hosts of a comma-separated list.

    Raises:
        ConfigError: an entry is not a host name.
    """
    return tuple(HostRule.read(entry) for entry in text.split(",") if entry.strip())


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a URL points: scheme, host (lower case), port, and path with query."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def read(cls, url: str, param: str) -> Place:
        """Reads a URL strictly.

        Raises:
            BadRequestError: another scheme, user names, addresses in any spelling, control
                characters, backslashes, a trailing dot, or what is no URL at all.
        """
        match = _URL.fullmatch(url.split("#", 1)[0]) if len(url) <= MAX_URL_CHARS else None
        if match is None or _NUMBER.fullmatch(match[2]) or not _is_port(match[3]):
            raise refused(
                f"{param} is not a URL that can be fetched: plain http(s)://host/path of at most "
                f"{MAX_URL_CHARS} ASCII characters, no user name, no address in place of a name",
                param,
            )
        scheme = match[1].lower()
        target = match[4] or "/"
        return cls(
            scheme=scheme,
            host=match[2].lower(),
            port=int(match[3]) if match[3] else _PORTS[scheme],
            target=target if target.startswith("/") else f"/{target}",
        )

    @property
    def authority(self) -> str:
        """Host and port as the Host header has them."""
        return self.host if self.port == _PORTS[self.scheme] else f"{self.host}:{self.port}"

    def at(self, address: str) -> str:
        """The URL with an address in place of the name."""
        shown = f"[{address}]" if ":" in address else address
        return f"{self.scheme}://{shown}:{self.port}{self.target}"


def _is_port(text: str | None) -> bool:
    return text is None or int(text) <= 65_535


def refused(message: str, param: str) -> BadRequestError:
    """What a client is told whose URL is not fetched by policy."""
    return BadRequestError(
        f"{message}; or send the image itself as data:image/jpeg;base64,...",
        param=param,
        code="image_url_not_allowed",
    )
