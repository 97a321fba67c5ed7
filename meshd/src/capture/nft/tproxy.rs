//! TPROXY: the connection is handed over as it is, addresses and conntrack untouched.

use super::super::wanted::Wanted;

pub(super) fn chains(wanted: &Wanted) -> String {
    let Wanted { vip4, vip6, capture_port, .. } = wanted;
    format!(
        "\x20 chain prerouting {{\n\
         \x20   type filter hook prerouting priority mangle; policy accept;\n\
         \x20   iif lo ip daddr {vip4} meta l4proto tcp tproxy ip to 127.0.0.1:{capture_port} accept\n\
         \x20   iif lo ip6 daddr {vip6} meta l4proto tcp tproxy ip6 to [::1]:{capture_port} accept\n\
         \x20   iif lo ip daddr {vip4} meta l4proto tcp reject with tcp reset\n\
         \x20   iif lo ip6 daddr {vip6} meta l4proto tcp reject with tcp reset\n\
         \x20   ip daddr {vip4} reject\n\
         \x20   ip6 daddr {vip6} reject\n\
         \x20 }}\n"
    )
}
