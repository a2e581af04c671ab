"""An extension of griffe, which reads docstrings for the site without importing the package."""

from typing import Any

import griffe

_OPTIONS = 'See <a href="options.html">Options</a>.'


class Options(griffe.Extension):
    """Links to the table of options where a docstring would list them all."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        if cls.docstring is not None:
            cls.docstring.value = cls.docstring.value.replace("{options}", _OPTIONS)
