"""One plug-in of each kind: see pyproject.toml, which names them."""
