# Prints the serial number of each certificate it is given: watch.py SOCKET
import sys
import threading

from spiffe import WorkloadApiClient


def told(context):
    print(context.default_svid.leaf.serial_number, flush=True)


with WorkloadApiClient(f"unix://{sys.argv[1]}") as client:
    client.stream_x509_contexts(told, lambda error: print(error, file=sys.stderr, flush=True))
    threading.Event().wait()
