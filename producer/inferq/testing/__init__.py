"""For the tests of a service that calls models: clients that need no Redis and no worker.

    from inferq.testing import FakeClient

    with FakeClient({"sentiment": Sentiment}) as client:
        assert my_service.answer(client, "so good") == "positive"

They check requests, encode them and decode results as `Client` and `AsyncClient` do. The models run
in the caller's own thread. docs/test-a-service.md tells all of it.
"""

from inferq.testing.clients import FakeAsyncClient, FakeClient
from inferq.testing.models import FakeModel, fake_model
from inferq.testing.worker import SeenRequest

__all__ = ["FakeAsyncClient", "FakeClient", "FakeModel", "SeenRequest", "fake_model"]
