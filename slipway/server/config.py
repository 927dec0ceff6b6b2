"""The server's options, their ranges and what contradicts; knows no engine and no HTTP."""

import dataclasses
from pathlib import Path

from slipway.errors import InvalidConfig
from slipway.server.logs import Format


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, whom it lets in, and how much it takes."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    served_model_name: str | None = None
    """What clients call the model; default: the name it was loaded by."""
    api_key: tuple[str, ...] = ()
    """Any of these lets a client in, on every route but the probes; none: everyone."""
    admin_api_key: tuple[str, ...] = ()
    """Any of these lets a client exchange weights and let the engine sleep; none: there are no such routes."""
    allow_origins: tuple[str, ...] = ()
    """Origins that browsers may call from (CORS); none by default."""
    strict: bool = False
    """Refuse a body with an unknown field; by default it is named in a warning header and in the log."""
    chat_template: str | None = None
    """A file, or the name of one of the model's own chat templates, for all chats."""
    output_parser: str = "auto"
    """How answers mark reasoning and calls: hermes, qwen3, qwen3_coder, mimo, deepseek_r1, llama3, plain, or auto: by
    the chat template."""
    max_queued_requests: int = 1024
    """Requests that may run and wait; beyond them 503."""
    max_queued_tokens: int = 2**20
    """Tokens of their prompts."""
    max_requests_per_client: int = 512
    """Of one API key, or address without keys; beyond them 429."""
    max_body_bytes: int = 8 * 2**20
    max_weights_bytes: int = 2**37
    """Of an update that is sent in pieces, which lies on the server's disk until the next one."""
    max_prompts: int = 1024
    """Prompts of one request; times n, no more sequences than that."""
    request_timeout_s: float = 600.0
    """A request ends after as long, with what it has."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, what runs may go on for as long."""
    log_format: Format = "text"
    vllm_metric_names: bool = False
    """Publish the metrics under vLLM's names, too."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in logprobs as "token_id:17", where a request does not set that itself."""
    enable_tokenizer_info_endpoint: bool = False
    """Serve GET /tokenizer_info: tokenizer_config.json with the chat template."""
    profile_dir: Path | None = None
    """Where /start_profile and /stop_profile leave traces of the engine; without it there are no such routes."""

    def __post_init__(self):
        for name in ("max_queued_requests", "max_queued_tokens", "max_requests_per_client", "max_body_bytes",
                     "max_prompts", "max_weights_bytes"):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidConfig(name, value, "an integer of at least 1")
        if type(self.port) is not int or not 0 <= self.port < 2**16:
            raise InvalidConfig("port", self.port, "0 to 65535")
        for name in ("request_timeout_s", "drain_timeout_s"):
            if not getattr(self, name) > 0:
                raise InvalidConfig(name, getattr(self, name), "seconds above 0")
        if self.profile_dir is not None and not self.admin_api_key:
            expected = "none without an admin_api_key: not everyone may trace"
            raise InvalidConfig("profile_dir", str(self.profile_dir), expected)
        for name in ("api_key", "admin_api_key"):
            if any(not key.strip() for key in getattr(self, name)):
                raise InvalidConfig(name, "an empty one", "a key that is not empty")

    def without_secrets(self) -> "ServerConfig":
        """As it may be printed."""
        keys, admins = ("***",) * len(self.api_key), ("***",) * len(self.admin_api_key)
        return dataclasses.replace(self, api_key=keys, admin_api_key=admins)
