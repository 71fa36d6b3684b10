"""What a model of one's own is written with: ``models/<name>/<version>/model.py``.

    from inferq.model import Model, RequestError

    class Sentiment(Model):
        inputs = {"x": "float32[batch, 3]"}
        outputs = {"y": "float32[batch]"}

        def load(self, context): ...
        def run(self, inputs): return {"y": inputs["x"].sum(axis=1)}

Importing it asks for NumPy and msgspec alone. docs/python-models.md tells all of it.
"""

from inferq.model.base import Answer, Context, Model
from inferq.model.trial import run_once
from inferq.shared.errors import RequestError

__all__ = ["Answer", "Context", "Model", "RequestError", "run_once"]
