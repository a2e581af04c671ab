"""From requests to tokens: three verbs, a scheduler over them, and the API that vLLM users know."""
