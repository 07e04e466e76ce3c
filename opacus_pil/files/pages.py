"""Templates of the pages that are written: escaped, and strict about what is missing.

Knows the template folder; no report and no audit.
"""

from __future__ import annotations

try:
    import jinja2
except ImportError as error:
    raise ImportError(
        "Expected jinja2 for the report, got none. "
        'Install the report extra: pip install "opacus-pil[report]".'
    ) from error


def template(name: str) -> jinja2.Template:
    """Return a template of the package by its file name."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("opacus_pil", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
