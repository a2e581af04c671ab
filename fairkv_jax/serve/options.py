"""What the server itself, beside its engine, can be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens and what it admits."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one; the log names it."""
    served_model_names: tuple[str, ...] = ()
    """Names that clients may ask for; the first one is in the answers. Empty: the model's own."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens `/v1` and the tokenizer's endpoints; empty: no key is asked for."""
    max_num_queued_reqs: int = 1024
    """Requests that may wait beside the running ones; one more is answered 503."""
    max_request_bytes: int = 16 << 20
    """A longer body is answered 413."""
    shutdown_timeout: int = 25
    """Seconds that running requests have to finish after SIGTERM, a little less than the 30 after
    which most process managers kill."""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    """PEM files; with both of them, HTTPS is spoken, and nothing else."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers (CORS), or "*"; empty: none but the server's own."""
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    enable_log_requests: bool = False
    """Whether prompts are logged."""
    log_level: str = "info"
