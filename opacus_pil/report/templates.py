"""Templates of the pages that are written: escaped, and strict about what is missing.

Knows the template folder and what every page of the family has: style, script and their hash, the
labels and the glossary. No record and no number.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import Any

from .. import __version__
from .words import LABELS, TERMS

try:
    import jinja2
    import markupsafe
except ImportError as error:
    raise ImportError(
        "Expected jinja2 for the report, got none. "
        'Install the report extra: pip install "opacus-pil[report]".'
    ) from error


def rendered(name: str, **values: Any) -> str:
    """Return a page of the family.

    Guarantee: what `values` hold reaches the page as text, never as markup; the browser runs the
        family's own script only, which it knows by its hash, and loads nothing.
    """
    script = _environment().get_template("page.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    page: str = (
        _environment()
        .get_template(name)
        .render(
            **values,
            version=__version__,
            style=markupsafe.Markup(_environment().get_template("style.css.j2").render()),
            script=markupsafe.Markup(script),
            script_hash=markupsafe.Markup(digest),
            labels=LABELS,
            terms=TERMS,
        )
    )
    return page


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("opacus_pil", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Columns of fifty thousand entries: no space between them, and letters as they are.
    compact = {"separators": (",", ":"), "ensure_ascii": False}
    environment.policies["json.dumps_kwargs"] = compact
    return environment
