"""An S3 server on this machine, which can be told to fail."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest


@contextmanager
def s3_server(
    fails: Callable[[int], bool] = lambda n: False, denies: Callable[[int], bool] = lambda n: False
) -> Iterator[str]:
    """The address of an empty bucket. fails, denies: the numbers of the requests that get an error 503 or 403.

    The environment names the server and credentials within the block. Skips the test when moto or s3fs is missing.
    """
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any) -> None:
            pass

    bucket = moto.DomainDispatcherApplication(moto.create_backend_app)
    counter = iter(range(1, 1 << 30))

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        n = next(counter)
        if denies(n):
            status, code = "403 Forbidden", b"AccessDenied"
        elif fails(n):
            status, code = "503 Service Unavailable", b"ServiceUnavailable"
        else:
            return bucket(environ, start_response)
        start_response(status, [("Content-Type", "application/xml")])
        has_body = environ["REQUEST_METHOD"] != "HEAD"
        return [b"<Error><Code>%s</Code><Message>no</Message></Error>" % code] if has_body else []

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            forget_servers()
            name = f"bucket-{server.server_port}"  # Servers of one process share what they hold.
            s3fs.S3FileSystem().mkdir(name)
            yield f"s3://{name}"
    finally:
        forget_servers()
        server.shutdown()
        thread.join()
        server.server_close()


def forget_servers() -> None:
    """Lets s3fs, also that of etils, by which orbax finds its files, connect anew."""
    from etils.epath import backend
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
