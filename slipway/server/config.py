"""Options of the HTTP server, their ranges, and the options that contradict each other.

Not here: options of the engine (engine/config.py), parsing of the command line (cli.py, flags.py).
"""

import dataclasses
from pathlib import Path

from slipway.engine.config import MAX_QUEUED_REQUESTS, MAX_QUEUED_TOKENS
from slipway.errors import InvalidConfig
from slipway.server.logs import Format

POSITIVE_INTEGERS = (
    "max_queued_requests", "max_queued_tokens", "max_requests_per_client", "max_body_bytes",
    "max_prompts", "max_weights_bytes",
)  # fmt: skip
POSITIVE_SECONDS = ("request_timeout_s", "drain_timeout_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Address of the server, its API keys, and its limits."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    served_model_name: str | None = None
    """Name of the model in requests and responses; by default the name it was loaded by."""
    api_key: tuple[str, ...] = ()
    """Keys of clients, needed on all routes except the probes; without any, access is free."""
    admin_api_key: tuple[str, ...] = ()
    """Keys for weight updates, sleep and traces; without any, these routes do not exist."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server from a browser (CORS); none by default."""
    strict: bool = False
    """Refuse unknown fields in requests; by default a warning header and the log name them."""
    chat_template: str | None = None
    """Chat template for all chats: a file, or the name of one of the model's own templates."""
    output_parser: str = "auto"
    """Format of reasoning and tool calls in the output: hermes, qwen3, qwen3_coder, mimo,
    deepseek_r1, llama3, plain, or auto, which detects it from the chat template."""
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    """Most requests that run or wait; further ones get status 503."""
    max_queued_tokens: int = MAX_QUEUED_TOKENS
    """Most prompt tokens of all requests that run or wait; requests beyond get status 503."""
    max_requests_per_client: int = 512
    """Most requests of one API key (or address) that run or wait; further ones get status 429."""
    max_body_bytes: int = 8 * 2**20
    """Most bytes of a request body; a larger body gets status 413."""
    max_weights_bytes: int = 2**37
    """Most bytes of a weight update sent in pieces; they stay on disk until the next update."""
    max_prompts: int = MAX_QUEUED_REQUESTS
    """Most prompts of one request; also the limit of prompts times n."""
    request_timeout_s: float = 600.0
    """Seconds after which a request ends with the output generated so far."""
    drain_timeout_s: float = 30.0
    """Seconds that running requests may continue after SIGTERM."""
    log_format: Format = "text"
    """Format of log lines: text, or one JSON object per line."""
    vllm_metric_names: bool = False
    """Publish every metric under vLLM's name as well."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in logprobs as "token_id:17" in requests that do not set this themselves."""
    enable_tokenizer_info_endpoint: bool = False
    """Serve GET /tokenizer_info: tokenizer_config.json with the chat template."""
    profile_dir: Path | None = None
    """Directory for traces of /start_profile and /stop_profile; by default no such routes."""

    def __post_init__(self):
        for name in POSITIVE_INTEGERS:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InvalidConfig(name, value, "an integer of at least 1")
        if type(self.port) is not int or not 0 <= self.port < 2**16:
            raise InvalidConfig("port", self.port, "0 to 65535")
        for name in POSITIVE_SECONDS:
            if not getattr(self, name) > 0:
                raise InvalidConfig(name, getattr(self, name), "a number of seconds above 0")
        if self.profile_dir is not None and not self.admin_api_key:
            expected = "an admin_api_key as well: only admins may record traces"
            raise InvalidConfig("profile_dir", str(self.profile_dir), expected)
        for name in ("api_key", "admin_api_key"):
            if any(not key.strip() for key in getattr(self, name)):
                raise InvalidConfig(name, "an empty key", "keys that are not empty")

    def without_secrets(self) -> "ServerConfig":
        """Return a copy for printing, with every key replaced by ***."""
        return dataclasses.replace(
            self,
            api_key=("***",) * len(self.api_key),
            admin_api_key=("***",) * len(self.admin_api_key),
        )
