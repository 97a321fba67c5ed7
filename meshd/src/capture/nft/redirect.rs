//! REDIRECT: the destination is rewritten to our listener; conntrack remembers what it was.

use super::super::wanted::Wanted;

/// Before Docker's and kube-proxy's DNAT at -100.
pub(super) const PRIORITY: i32 = -105;

pub(super) fn chains(wanted: &Wanted) -> String {
    let Wanted { vip4, vip6, capture_port, .. } = wanted;
    format!(
        "\x20 chain output {{\n\
         \x20   type nat hook output priority {PRIORITY}; policy accept;\n\
         \x20   ip daddr {vip4} meta l4proto tcp redirect to :{capture_port}\n\
         \x20   ip6 daddr {vip6} meta l4proto tcp redirect to :{capture_port}\n\
         \x20 }}\n\
         \x20 chain output_rest {{\n\
         \x20   type filter hook output priority filter; policy accept;\n\
         \x20   ip daddr {vip4} reject\n\
         \x20   ip6 daddr {vip6} reject\n\
         \x20 }}\n\
         \x20 chain prerouting {{\n\
         \x20   type filter hook prerouting priority mangle; policy accept;\n\
         \x20   iif != lo ip daddr {vip4} reject\n\
         \x20   iif != lo ip6 daddr {vip6} reject\n\
         \x20 }}\n"
    )
}
