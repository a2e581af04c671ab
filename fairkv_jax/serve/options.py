"""Options of the server itself; those of its engine are declared in `fairkv_jax.config`."""

from dataclasses import dataclass

from fairkv_jax.options import option, options_of

API_KEY_VARIABLE = "FAIRKV_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error")

_COMPILING = "Compilation"
_SERVER = "Server"
_CORS = "Cross-origin requests (CORS)"


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, which requests it admits, and what it logs."""

    compilation_cache_dir: str = option(
        "~/.cache/fairkv_jax/compiled",
        "Folder that keeps compiled programs for the next start. Empty: none are kept.",
        group=_COMPILING,
    )
    host: str = option("127.0.0.1", "Address to listen on.", group=_SERVER)
    port: int = option(
        8000, "Port to listen on. 0: a free port, which the log names.", group=_SERVER
    )
    served_model_names: tuple[str, ...] = option(
        (),
        "Comma-separated model names that requests may use. Answers carry the first one.",
        name="served_model_name",
        group=_SERVER,
        default_text="the model's own name",
    )
    api_keys: tuple[str, ...] = option(
        (),
        "Comma-separated API keys. Requests to /v1 and to the tokenizer endpoints must carry one "
        f"of them or of those in ${API_KEY_VARIABLE}.",
        name="api_key",
        group=_SERVER,
    )
    ssl_keyfile: str | None = option(
        None,
        "PEM file of the private key. With ssl_certfile, the server speaks only HTTPS.",
        group=_SERVER,
    )
    ssl_certfile: str | None = option(None, "PEM file of the certificate.", group=_SERVER)
    max_num_queued_reqs: int = option(
        1024, "Maximum queued requests; more get HTTP 503.", group=_SERVER
    )
    max_request_bytes: int = option(
        16 << 20, "Maximum bytes of a request body; longer ones get HTTP 413.", group=_SERVER
    )
    shutdown_timeout: int = option(
        25, "Seconds that running requests have to finish after SIGTERM.", group=_SERVER
    )
    """A little less than the 30 seconds after which most process managers kill."""
    log_level: str = option(
        "info", "Lowest level of messages that are logged.", group=_SERVER, choices=LOG_LEVELS
    )
    enable_log_requests: bool = option(
        False, "Log the prompts of requests in the access log.", group=_SERVER
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "Origins whose pages may read answers: a comma-separated or JSON list, or * for any.",
        group=_CORS,
        default_text="the server's own",
    )
    allowed_methods: tuple[str, ...] = option(
        ("*",), "HTTP methods that pages of these origins may use.", group=_CORS
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "HTTP headers that pages of these origins may send.", group=_CORS
    )
    allow_credentials: bool = option(
        False, "Allow pages of these origins to send cookies.", group=_CORS
    )


SERVER_OPTIONS = options_of(ServerOptions)
