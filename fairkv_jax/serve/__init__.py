"""An HTTP server that speaks the OpenAI API, as vLLM's users know it.

    argv -> flags -> [thread: engine.step() in a loop] <- async_engine -> routes -> uvicorn

One thread owns the engine and everything of JAX; the event loop owns the connections and never
waits for the device. `python -m fairkv_jax.serve --help` lists the flags.
"""
