//! Texts of unit files. Pure.

use crate::plan::Workload;

/// meshd as a unit: its own user, two capabilities, always back.
pub const MESHD: &str = "\
[Unit]
Description=meshd
After=network.target
# Ended often, it is still to come back.
StartLimitIntervalSec=0

[Service]
Type=exec
User=meshd
Group=meshd
AmbientCapabilities=CAP_NET_ADMIN CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE
ExecStart=/usr/bin/meshd run
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=100ms
LimitNOFILE=65536
RuntimeDirectory=meshd
StateDirectory=meshd
LogsDirectory=meshd

[Install]
WantedBy=multi-user.target
";

/// `sysusers.d`: a user for each workload, named like it.
pub fn users(workloads: &[Workload]) -> String {
    workloads.iter().map(|Workload { name, uid, .. }| format!("u {name} {uid}\n")).collect()
}

/// A service that runs `command` with `settings`, one `Key=value` a line.
pub fn service(command: &str, settings: &[&str]) -> String {
    let settings: String = settings.iter().map(|setting| format!("{setting}\n")).collect();
    format!("[Service]\nType=exec\n{settings}ExecStart={command}\n\n[Install]\nWantedBy=multi-user.target\n")
}

/// Listens for a service that is started by its first connection and accepts by itself.
pub fn socket(listen: &str) -> String {
    format!("[Socket]\nListenStream={listen}\nAccept=no\n\n[Install]\nWantedBy=sockets.target\n")
}
