"""What workers announce of the models they serve."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from inferq.shared.errors import ConfigError
from inferq.shared.schema import ModelAdvert

_advert_decoder = msgspec.msgpack.Decoder(ModelAdvert)
encode_advert: Callable[[ModelAdvert], bytes] = msgspec.msgpack.Encoder().encode


def decode_advert(data: bytes) -> ModelAdvert:
    """What a worker announced. ConfigError if another version wrote it."""
    try:
        return _advert_decoder.decode(data)
    except msgspec.DecodeError as problem:
        raise ConfigError(f"a model's announcement cannot be read: {problem}") from problem
