"""An HTTP server with an OpenAI-compatible API that matches vLLM's.

    argv -> flags -> [thread: engine.step() in a loop] <- async_engine -> routes -> uvicorn

One thread owns the engine and makes all JAX calls. The event loop owns the connections and never
waits for the devices. `python -m fairkv_jax.serve --help` lists the flags.
"""
