# A token by PyPI's `spiffe`, judged by the API and by the client itself with the bundle it fetched: fetch_token.py SOCKET AUDIENCE OTHER
import sys

from spiffe import JwtSvid, WorkloadApiClient

socket, audience, other = sys.argv[1:]
with WorkloadApiClient(f"unix://{socket}") as client:
    svid = client.fetch_jwt_svid({audience}, timeout=10)
    judged = client.validate_jwt_svid(svid.token, audience, timeout=10)
    bundle = client.fetch_jwt_bundles(timeout=10).get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    own = JwtSvid.parse_and_validate(svid.token, bundle, {audience})
    assert svid.spiffe_id == judged.spiffe_id == own.spiffe_id
    print(svid.spiffe_id)
    try:
        client.validate_jwt_svid(svid.token, other, timeout=10)
        print("accepted")
    except Exception as error:
        print(error)
