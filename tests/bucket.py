"""A bucket on this machine: real clients (gcsfs, TensorStore, google-cloud-storage) talk to an emulator over HTTP."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator

BUCKET = 'compactlm-test'

# gcsfs reads it when it is imported, and would ask the real service of what kind the bucket is.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


@contextlib.contextmanager
def emulated(folder) -> Iterator[str]:
  """gs://BUCKET, whose objects are kept in `folder`; to be opened once in a process, before a client is made."""
  from gcp_storage_emulator.server import create_server

  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  settings = {
    'STORAGE_EMULATOR_HOST': url,  # gcsfs and google-cloud-storage
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_CLOUD_PROJECT': 'test',
    'NO_GCE_CHECK': 'true',  # google-auth would look for the metadata server of a virtual machine
  }
  before = {name: os.environ.get(name) for name in settings}
  os.environ.update(settings)
  with create_server('127.0.0.1', port, data_dir=str(folder), default_bucket=BUCKET):
    try:
      yield f'gs://{BUCKET}'
    finally:
      for name, value in before.items():
        if value is None:
          del os.environ[name]
        else:
          os.environ[name] = value


def refuse(monkeypatch, *methods):
  """Requests by these HTTP methods are answered as without permission."""
  from gcp_storage_emulator import server

  handle = server.Router.handle

  def refused(self, method):
    if method not in methods:
      return handle(self, method)
    request = self._request_handler
    request.rfile.read(int(request.headers.get('content-length') or 0))
    said = 'someone@example.com does not have storage.objects access to the Google Cloud Storage object.'
    body = json.dumps({'error': {'code': 403, 'message': said}}).encode()
    request.send_response(403)
    request.send_header('content-length', str(len(body)))
    request.end_headers()
    request.wfile.write(body)

  monkeypatch.setattr(server.Router, 'handle', refused)
