"""Settings of a server: flags over environment (`SIEVE_*`) over a YAML file over defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from patches.config import Retention, SieveConfig
from patches.selection import SELECTORS
from serving.errors import ConfigError
from serving.image_hosts import read_rules

DEMO = Path(__file__).parent / "demo"
ENV_PREFIX = "SIEVE_"


class Settings(BaseSettings):
    """Everything `python -m serving` can be told.

    Every field is a flag (`--max-num-seqs`), an environment variable (`SIEVE_MAX_NUM_SEQS`) and a
    key of the YAML file named by `SIEVE_CONFIG` or `--config`.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str = Field(
        str(DEMO / "base"), description="LLaVA-1.5 checkpoint: a folder, or a Hugging Face id"
    )
    base_sha256: str | None = Field(
        None,
        pattern="^[0-9a-fA-F]{64}$",
        description="refuse to start unless the folder --model has this hash: that of what "
        "`LC_ALL=C sha256sum *` prints in it",
    )
    model_name: str | None = Field(
        None, description="the base model's name in the API; by default the last part of --model"
    )
    adapters: str | None = Field(
        None,
        description="folder with one LoRA adapter a subfolder (name or name@version), or a URL of "
        "one that fsspec reads; the demo's own where the demo checkpoint is served",
    )
    max_lora_rank: int | None = Field(
        None, gt=0, le=512, description="largest rank of adapters; by default what --adapters holds"
    )
    max_loras: int | None = Field(
        None, gt=0, description="adapters in one batch; by default as --adapters holds, 2 to 8"
    )
    max_cpu_loras: int | None = Field(
        None, gt=0, description="adapters in memory; by default as --adapters holds, 8 to 64"
    )
    projector_lora: bool = Field(
        False, description="room for adapters with projector weights that come later"
    )
    structures: Path | None = Field(None, description="YAML file with label structures of yours")
    retention: float = Field(
        1.0, gt=0, le=1, description="share of visual tokens kept unless a request says otherwise"
    )
    selector: str = Field("cls", description=f"which patches are kept: {', '.join(SELECTORS)}")
    label_structure: str = Field(
        "sentiment", description="structure of /v1/label where neither request nor adapter says"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="numbers the model computes in; auto is bfloat16 for most checkpoints"
    )
    max_model_len: int | None = Field(
        None, gt=0, description="most tokens of prompt and answer; by default the checkpoint's"
    )
    max_num_seqs: int = Field(64, gt=0, description="most requests decoded at once")
    max_images: int = Field(4, gt=0, le=64, description="most images in one request")
    max_image_bytes: int = Field(10_000_000, gt=0, description="most bytes of one encoded image")
    max_image_pixels: int = Field(16_000_000, gt=0, description="most pixels of one image")
    image_workers: int | None = Field(
        None,
        ge=0,
        description="processes that decode images; by default a core less than the machine has, 1 "
        "to 8. 0 decodes in a thread of the server, without a deadline: not for images of "
        "strangers",
    )
    image_timeout: float = Field(
        5.0,
        gt=0,
        description="seconds to decode one image, then its worker is killed (400), and to wait for "
        "a worker (503)",
    )
    image_hosts: str = Field(
        "",
        description="hosts that images may be fetched from by http(s), with commas: "
        "img.example.org, *.example.org, example.org:8443; none unless named",
    )
    image_fetch_timeout: float = Field(
        5.0, gt=0, description="seconds to fetch all remote images of a request"
    )
    grammar_cpu_s: float = Field(
        2.0,
        gt=0,
        description="seconds of processor time that a client's JSON schema or choices may take to "
        "compile; more is a 400",
    )
    image_fetches: int = Field(8, gt=0, description="most remote images fetched at once")
    max_text_chars: int = Field(20_000, gt=0, description="most characters of a post's text")
    kv_cache_gib: int = Field(
        1, gt=0, description="KV cache in whole GiB, on CPU (a GPU uses --gpu-memory)"
    )
    image_cache_gib: float = Field(
        1.0,
        ge=0,
        description="processed images that an engine keeps for requests that send them again, in "
        "GiB of ordinary memory",
    )
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory to use")
    tower_batch_size: int = Field(8, gt=0, description="most images in one call of the tower")
    tower_cache_mib: int = Field(
        64,
        ge=0,
        description="MiB of the tower's features that a worker keeps of the images it saw last: "
        "one that comes again at another ratio, as in a cascade, skips the tower; 0 keeps none",
    )
    prefix_caching: bool = Field(True, description="reuse the KV of equal prompts")
    enforce_eager: bool | None = Field(
        None, description="no compilation or CUDA graphs; by default on CPU only"
    )
    request_timeout_s: float = Field(
        120.0, gt=0, description="a request not answered by then is cancelled (503)"
    )
    client_timeout_s: float = Field(
        60.0,
        gt=0,
        description="seconds a client has to send a whole request, and to read on once it stops "
        "reading an answer; then its connection is closed",
    )
    keys: Path | None = Field(
        None,
        description="YAML file with API keys, see `python -m serving key --help`; without one "
        "whoever reaches the server may do all that it does",
    )
    open_metrics: bool = Field(
        False, description="with --keys, /metrics needs no key; else it needs an admin's"
    )
    docs: bool = Field(False, description="serve the OpenAPI document at /openapi.json")
    hang_timeout_s: float = Field(
        30.0,
        gt=0,
        description="an engine that answers no ping for so long hangs: it is killed and started "
        "again; must be longer than the longest step",
    )
    max_restarts: int = Field(
        5,
        ge=0,
        description="restarts of an engine in a row, each within a minute of the last; then the "
        "server ends with status 4",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        description="after SIGTERM, accepted requests have so long to be answered; new ones get a "
        "503",
    )
    max_pending: int = Field(
        512,
        gt=0,
        description="requests taken at once by an HTTP side; more get a 429. Fewer are taken (503) "
        "where a new one would wait over half of --request-timeout-s, as fast as they are answered",
    )
    max_pending_bytes: int = Field(
        256_000_000,
        gt=0,
        description="bytes of their bodies, together; a body takes about four times its size in "
        "memory until it is answered",
    )
    max_queued_tokens: int | None = Field(
        None,
        ge=0,
        description="prompt tokens, kept visual ones among them, that wait in an engine; more get "
        "a 503. By default --max-num-seqs prompts as long as the model reads: time to work them "
        "off is this divided by the engine's prompt tokens a second; 0 is no bound",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="how much is logged; info has a line a request"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="json has an object a line, with the request's id"
    )

    @field_validator("image_hosts")
    @classmethod
    def _readable_hosts(cls, value: str) -> str:
        try:
            read_rules(value)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return value

    @field_validator("selector")
    @classmethod
    def _known_selector(cls, value: str) -> str:
        if value not in SELECTORS:
            raise ValueError(f"{value!r} is unknown; allowed are {', '.join(SELECTORS)}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first (as init settings), then the environment, then the YAML file."""
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        path = os.environ.get(f"{ENV_PREFIX}CONFIG")
        if path:
            sources.append(YamlConfigSettingsSource(settings_cls, yaml_file=path))
        return tuple(sources)

    @property
    def is_demo(self) -> bool:
        """Whether the shipped demo checkpoint is served."""
        return Path(self.model).resolve() == (DEMO / "base").resolve()

    @field_validator("adapters", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @property
    def adapters_folder(self) -> str | None:
        """Where adapters are looked for, a path or a URL."""
        return self.adapters or (str(DEMO / "adapters") if self.is_demo else None)

    @property
    def served_name(self) -> str:
        """The base model's name in the API."""
        return self.model_name or ("demo" if self.is_demo else Path(self.model).name)

    @property
    def num_image_workers(self) -> int:
        """Processes that decode images."""
        if self.image_workers is not None:
            return self.image_workers
        return min(8, max(1, len(os.sched_getaffinity(0)) - 1))

    @property
    def sieve(self) -> SieveConfig:
        """What the plugin is started with."""
        return SieveConfig(
            retention=Retention(ratio=self.retention, selector=self.selector),
            tower_batch_size=self.tower_batch_size,
            tower_cache_mib=self.tower_cache_mib,
        )
