# What a program does with PyPI's `spiffe`: fetch.py SOCKET DIRECTORY
import pathlib
import sys

from cryptography.hazmat.primitives.serialization import Encoding
from spiffe import WorkloadApiClient

socket, directory = sys.argv[1], pathlib.Path(sys.argv[2])
with WorkloadApiClient(f"unix://{socket}") as client:
    svid = client.fetch_x509_svid(timeout=10)
    bundle = client.fetch_x509_bundles(timeout=10).get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    svid.save(directory / "chain.pem", directory / "key.pem", Encoding.PEM)
    bundle.save(directory / "roots.pem", Encoding.PEM)
    print(svid.spiffe_id)
