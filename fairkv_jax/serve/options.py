"""Declares the server's options; `fairkv_jax.config` declares those of the engine."""

from dataclasses import dataclass

from fairkv_jax.options import option, options_of
from fairkv_jax.serve.reasoning import REASONING_FORMATS
from fairkv_jax.serve.tool_calls import TOOL_PARSERS

API_KEY_VARIABLE = "FAIRKV_API_KEY"
LOG_LEVELS = ("debug", "info", "warning", "error")

_COMPILING = "Compilation"
_SERVER = "Server"
_MESSAGES = "Tool calls and reasoning"
_CORS = "Cross-origin requests (CORS)"


@dataclass(frozen=True)
class ServerOptions:
    """Options for the address, admission of requests, logging, the form of answers, and CORS."""

    compilation_cache_dir: str = option(
        "~/.cache/fairkv_jax/compiled",
        "Folder in which compiled programs are cached. Empty: no cache.",
        group=_COMPILING,
    )
    host: str = option("127.0.0.1", "Address to listen on.", group=_SERVER)
    port: int = option(8000, "Port to listen on. 0: a free port, which is logged.", group=_SERVER)
    served_model_names: tuple[str, ...] = option(
        (),
        "Comma-separated model names that requests may use. Responses contain the first one.",
        name="served_model_name",
        group=_SERVER,
        default_text="the model's own name",
    )
    api_keys: tuple[str, ...] = option(
        (),
        "Comma-separated API keys. Requests to /v1, the tokenizer endpoints, /load, /metrics, "
        "/stats, /plan and /docs must contain one of them or of those in "
        f"${API_KEY_VARIABLE}; see open_metrics.",
        name="api_key",
        group=_SERVER,
    )
    ssl_keyfile: str | None = option(
        None,
        "PEM file of the private key. With ssl_certfile, the server accepts only HTTPS.",
        group=_SERVER,
    )
    ssl_certfile: str | None = option(None, "PEM file of the certificate.", group=_SERVER)
    max_num_queued_reqs: int = option(
        1024,
        "Maximum queued requests. More get HTTP 503, or those of a client that has more of them.",
        group=_SERVER,
    )
    max_num_queued_reqs_per_key: int | None = option(
        None,
        "Maximum queued requests of one API key, or of one address without keys; more get HTTP "
        "429.",
        group=_SERVER,
        default_text="no limit of its own",
    )
    max_queue_wait: int | None = option(
        None,
        "Maximum seconds until the prefill of a request begins; others get HTTP 503.",
        group=_SERVER,
        default_text="no limit",
    )
    open_metrics: bool = option(
        False,
        "Serve /load, /metrics, /stats, /plan and /docs without an API key although there are "
        "keys.",
        group=_SERVER,
    )
    max_request_bytes: int = option(
        16 << 20, "Maximum bytes of a request body; longer ones get HTTP 413.", group=_SERVER
    )
    max_connections: int = option(
        4096,
        "Maximum open connections. Beyond that, the one whose client has been silent longest is "
        "closed; if all are being answered, the new one gets HTTP 503.",
        group=_SERVER,
    )
    request_read_timeout: int = option(
        60, "Seconds that a client has to send a whole request.", group=_SERVER
    )
    response_write_timeout: int = option(
        60,
        "Seconds that a client has to read 64 KiB of its response, or the rest of it.",
        group=_SERVER,
    )
    shutdown_timeout: int = option(
        25, "Seconds that running requests have to finish after SIGTERM.", group=_SERVER
    )
    """The default is below the 30 seconds after which most process managers send SIGKILL."""
    stall_timeout: int = option(
        120,
        "Seconds without progress, while requests are running, after which /health returns HTTP "
        "503. With several hosts, a step that takes as long ends all of them.",
        group=_SERVER,
    )
    log_level: str = option(
        "info", "Minimum level of logged messages.", group=_SERVER, choices=LOG_LEVELS
    )
    enable_log_requests: bool = option(False, "Write prompts to the access log.", group=_SERVER)
    enable_auto_tool_choice: bool = option(
        False,
        "Let the model decide whether to call the tools of a request. It needs tool_call_parser.",
        group=_MESSAGES,
    )
    tool_call_parser: str | None = option(
        None,
        "Format in which the model writes tool calls: hermes (also Qwen 2.5 and Qwen 3), "
        "llama3_json, mistral or pythonic (Llama 3.2).",
        group=_MESSAGES,
        choices=tuple(TOOL_PARSERS),
    )
    reasoning_parser: str | None = option(
        None,
        "Format in which the model writes its reasoning: deepseek_r1 (also QwQ) or qwen3. Without "
        "it, reasoning is part of the content.",
        group=_MESSAGES,
        choices=tuple(REASONING_FORMATS),
    )
    allowed_origins: tuple[str, ...] = option(
        (),
        "Allowed origins: a comma-separated or JSON list, or * for any.",
        group=_CORS,
        default_text="the server's own",
    )
    allowed_methods: tuple[str, ...] = option(
        ("*",), "HTTP methods allowed for these origins.", group=_CORS
    )
    allowed_headers: tuple[str, ...] = option(
        ("*",), "HTTP headers allowed for these origins.", group=_CORS
    )
    allow_credentials: bool = option(
        False, "Allow cookies and credentials from these origins.", group=_CORS
    )


SERVER_OPTIONS = options_of(ServerOptions)
