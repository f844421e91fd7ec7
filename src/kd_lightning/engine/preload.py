"""What the server of worker processes imports, once for all of them."""

from kd_lightning.startup import importing

with importing():
    import kd_lightning.engine.trainer  # noqa: F401
