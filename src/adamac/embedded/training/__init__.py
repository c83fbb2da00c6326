"""How the embedded model was trained; nothing here is needed to use it.

:mod:`adamac.embedded.training.train` is the program. What it learns from: a procedural world (``scenes``, and below it ``script``,
``drawing``, ``motions``, ``meetings``, ``mechanisms``), painted by ``rendering``, and a ``film``. What learns: ``vae``, ``reading`` (the
text encoder) and ``dit``. ``MODEL_CARD.md`` says what came of it.
"""
