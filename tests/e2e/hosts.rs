//! Runs clients that know a host by its name only.

use std::io::Write;

use crate::command::{Done, run_client};
use crate::program::Proxy;

/// Runs its arguments where the file named first takes the place of the system's hosts file.
const WITH_HOSTS: &str = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";

/// Runs a client for which these hosts have the address of the proxy.
pub(crate) async fn run_with_hosts(proxy: &Proxy, hosts: &[&str], program: &str, arguments: &[&str]) -> Done {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for host in hosts {
        writeln!(file, "{} {host}", proxy.address.ip()).unwrap();
    }
    let path = file.path().to_str().unwrap();
    let outside = [
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        WITH_HOSTS,
        "sh",
        path,
        program,
    ];
    run_client("unshare", &[&outside[..], arguments].concat()).await
}
