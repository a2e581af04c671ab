"""An extension of griffe, which reads docstrings for the site without importing the package."""

import re
from typing import Any

import griffe

_OPTIONS = 'See <a href="options.html">Options</a>.'
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Shows examples as code, and links to the table of options where a class would list them."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value.replace("{options}", _OPTIONS)
            obj.docstring.value = _EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", text)
