"""What a Python program does through the tunnel, with httpx and grpcio.

python client.py HTTP_HOST:PORT GRPC_HOST:PORT CERTIFICATE
"""

import hashlib
import ssl
import sys

import grpc
import httpx

web, rpc, certificate = sys.argv[1:]
pieces = [f"piece {i} of what is sent; ".encode() for i in range(1000)]


def check(scheme, version):
    """GET and a POST of unknown length. httpx has no way to read trailers."""
    two = version == "HTTP/2"
    trust = ssl.create_default_context(cafile=certificate)
    with httpx.Client(http1=not two, http2=two, verify=trust, trust_env=False, timeout=60) as client:
        reply = client.get(f"{scheme}://{web}/hello?from=python").raise_for_status()
        assert reply.http_version == version, reply.http_version
        assert reply.json()["target"] == "/hello?from=python", reply.text
        reply = client.post(f"{scheme}://{web}/upload", content=iter(pieces)).raise_for_status()
        assert reply.json()["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest(), reply.text


def call(channel):
    """A unary and a bidirectional call: response_size 3 in, payload.body of three zeros out."""
    answer = bytes([0x0A, 5, 0x12, 3, 0, 0, 0])
    unary = channel.unary_unary("/grpc.testing.TestService/UnaryCall")
    assert unary(bytes([0x10, 3]), timeout=60) == answer
    duplex = channel.stream_stream("/grpc.testing.TestService/FullDuplexCall")
    messages = duplex(iter([bytes([0x12, 2, 0x08, 3])] * 5), timeout=60)
    assert list(messages) == [answer] * 5
    # grpcio gives trailers the name of metadata.
    assert messages.code() is grpc.StatusCode.OK


for scheme in ("http", "https"):
    for version in ("HTTP/1.1", "HTTP/2"):
        check(scheme, version)
        print(f"{version}, {scheme}")

try:
    httpx.get(f"https://{web}/hello", trust_env=False)
except httpx.ConnectError as error:
    assert "CERTIFICATE_VERIFY_FAILED" in str(error), error
else:
    raise AssertionError("trusted without the certificate")

options = [("grpc.enable_http_proxy", 0)]
with grpc.insecure_channel(rpc, options) as channel:
    call(channel)
    print("gRPC, http")
with open(certificate, "rb") as file:
    trust = grpc.ssl_channel_credentials(file.read())
with grpc.secure_channel(rpc, trust, options) as channel:
    call(channel)
    print("gRPC, https")
