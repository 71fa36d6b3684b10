"""Bytes on the wire: requests, tensors, results and what workers announce."""

from inferq.shared.codec.adverts import decode_advert, encode_advert
from inferq.shared.codec.content import JSON, MSGPACK, MalformedMessage, brief
from inferq.shared.codec.messages import (
    MAX_HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    Body,
    Envelope,
    Headers,
    Properties,
    RequestEncoder,
    decode_body,
    decode_envelope,
    guess_ticket,
    shown,
)
from inferq.shared.codec.results import (
    decode_meta,
    decode_outputs,
    decode_success,
    encode_failure,
    encode_meta,
    encode_revoked,
    encode_success,
)
from inferq.shared.codec.tensors import (
    decode_tensor,
    encode_reference,
    encode_tensor,
    is_lists,
    reference_of,
    tensor_bytes,
    wire_array,
)

__all__ = [
    "JSON",
    "MAX_HEAD_BYTES",
    "MAX_MESSAGE_BYTES",
    "MSGPACK",
    "Body",
    "Envelope",
    "Headers",
    "MalformedMessage",
    "Properties",
    "RequestEncoder",
    "brief",
    "decode_advert",
    "decode_body",
    "decode_envelope",
    "decode_meta",
    "decode_outputs",
    "decode_success",
    "decode_tensor",
    "encode_advert",
    "encode_failure",
    "encode_meta",
    "encode_reference",
    "encode_revoked",
    "encode_success",
    "encode_tensor",
    "guess_ticket",
    "is_lists",
    "reference_of",
    "shown",
    "tensor_bytes",
    "wire_array",
]
