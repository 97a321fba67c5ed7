# Prints how many keys of tokens each bundle has: watch_jwt.py SOCKET
import sys
import threading

from spiffe import WorkloadApiClient


def told(bundles):
    print(*(len(bundle.jwt_authorities) for bundle in bundles.bundles), flush=True)


with WorkloadApiClient(f"unix://{sys.argv[1]}") as client:
    client.stream_jwt_bundles(told, lambda error: print(error, file=sys.stderr, flush=True))
    threading.Event().wait()
