# /// script
# requires-python = ">=3.11"
# dependencies = ["instructor>=1.17"]
# ///
"""Asks the server at the address that is given for a city, in one of Instructor's modes."""

import sys
from collections.abc import Iterable

import instructor
from openai import OpenAI
from pydantic import BaseModel


class City(BaseModel):
    """Where the weather is asked for."""

    city: str


url, mode = sys.argv[1:]
client = instructor.from_openai(
    OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=instructor.Mode[mode]
)
question = {
    "model": "scripted",
    "messages": [{"role": "user", "content": "Where?"}],
    "max_tokens": 200,
    "max_retries": 0,
}
if mode == "PARALLEL_TOOLS":
    found = client.chat.completions.create(response_model=Iterable[City], **question)
    assert [each.city for each in found] == ["Rome"]
else:
    city, completion = client.chat.completions.create_with_completion(
        response_model=City, **question
    )
    assert city.city == "Rome"
    assert completion.usage.completion_tokens > 0
    parts = list(client.chat.completions.create_partial(response_model=City, **question))
    assert parts[-1].city == "Rome"
print("done")
